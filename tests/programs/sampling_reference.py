"""Sampling in NumPy on whole rows of logits, and the runner of `sample` that tests compare with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np

from moe_jax import SamplingParams
from moe_jax.programs.sampling import SamplerInputs, SamplerOutput, SamplingMetadata, sample
from moe_jax.sharding import Placement, Role

PLACEMENTS = {1: "data=1", 2: "data=2,tensor=2", 4: "tensor=4"}
"""Placements by the number of vocabulary shards. With two there are two token shards, which may take different branches
of a conditional."""
POSITIONS = 24


@dataclass(frozen=True)
class FakeRequest:
    params: SamplingParams
    seed: int = 0
    prompt: Sequence[int] = (0,)
    stop_ids: Collection[int] = ()


@cache
def program(shards: int, vocab_size: int, top: int) -> Any:
    """Compile `sample` for logits of all vocabulary shards, padded as the LM head pads them."""
    placement = Placement.parse(PLACEMENTS[shards])
    rows = placement.spec((Role.TOKENS,), (0,))

    def run(logits: Any, sampling: Any, *rest: Any) -> SamplerOutput:
        inputs = None if sampling is None else SamplerInputs(sampling, *rest)
        return sample(logits, vocab_size, placement, inputs, top=top)

    specs = placement.spec((Role.TOKENS, Role.HEADS), (0, 0)), rows, rows, rows
    return jax.jit(jax.shard_map(run, mesh=placement.mesh, in_specs=specs, out_specs=rows))


def padded(logits: np.ndarray, shards: int) -> np.ndarray:
    """Append columns of garbage, so that they divide over the shards."""
    logits = np.asarray(logits, np.float32)
    garbage = np.resize([np.nan, np.inf, 1e9], (-logits.shape[1] % shards + 2 * shards))
    return np.concatenate([logits, np.broadcast_to(garbage, (len(logits), len(garbage)))], axis=1, dtype=np.float32)


def run(
    shards: int,
    logits: np.ndarray,
    requests: Sequence[FakeRequest | None] | None = None,
    outputs: Sequence[Sequence[int]] = (),
    *,
    generated: Sequence[int] | None = None,
    top: int = 0,
) -> SamplerOutput:
    """Sample for requests that have generated `outputs`; `generated` overrides the number of tokens in them."""
    outputs = outputs or [()] * len(logits)
    counts = np.array([len(output) for output in outputs] if generated is None else generated, np.int32)
    history, sampling = None, None
    if requests is not None:
        sampling = SamplingMetadata.of(requests)
        history = np.full((len(logits), POSITIONS), 3, np.int32)
        for row, request, output in zip(history, requests, outputs, strict=True):
            tokens = [*(request.prompt if request else ()), *output]
            row[: len(tokens)] = tokens
    compiled = program(shards, logits.shape[1], top)
    return jax.device_get(compiled(padded(logits, shards), sampling, counts, history))


def expected_token(logits: np.ndarray, request: FakeRequest, output: Sequence[int]) -> int:
    """The next token of a request that has generated `output`."""
    logits = processed(logits, request, output)
    if request.params.temperature == 0:
        return int(np.argmax(logits))
    cdf = np.cumsum(truncated(logits, request.params))
    return int(np.searchsorted(cdf, uniform(request.seed, len(output)), side="right"))


def processed(logits: np.ndarray, request: FakeRequest, output: Sequence[int]) -> np.ndarray:
    """Logits after biases, penalties and `min_tokens`."""
    params, logits = request.params, logits.astype(np.float32)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += np.float32(bias)
    for token in {*request.prompt, *output}:
        penalty = np.float32(params.repetition_penalty)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, count in Counter(output).items():
        logits[token] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * np.float32(count)
    if len(output) < params.min_tokens:
        logits[list(request.stop_ids)] = -np.inf
    return logits


def truncated(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after top-k, top-p and min-p, by sorting; tokens equal to the last one that is kept are kept."""
    weights = np.exp((logits.astype(float) - logits.max()) / params.temperature)
    descending = np.sort(logits)[::-1]
    if 0 < params.top_k < len(logits):
        weights[logits < descending[params.top_k - 1]] = 0
    if params.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        reached = np.cumsum(weights[order]) >= params.top_p * weights.sum()
        weights[logits < descending[np.argmax(reached)]] = 0
    weights[weights < np.float32(params.min_p)] = 0
    return weights / weights.sum()


def uniform(seed: int, generated: int) -> float:
    return float(jax.random.uniform(jax.random.fold_in(jax.random.key(seed), generated)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(float) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
