"""Runs a tiny decoder on a placement, chunk after chunk: a dense layer, then an MoE with a shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import jax
import numpy as np
from flax import nnx
from jax.stages import Wrapped
from placements import placement
from scipy.special import log_softmax

from moe_jax.batching import Seat, Segment, prefill_steps
from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig, MoEConfig, SharedExpertConfig
from moe_jax.models import Batch, Caches, ShardedDecoder, pack
from moe_jax.sharding import Combine, RaggedCombine, ReduceCombine, Role, Route

ATTENTION = AttentionConfig(heads=8, kv_heads=2, head_dim=4, rope_theta=1e4)
MOE = MoEConfig(experts=8, top_k=2, width=16, renormalise=True, shared=SharedExpertConfig(16, gated=True))
LAYERS = (LayerConfig(ATTENTION, DenseConfig(16)), LayerConfig(ATTENTION, MOE))
MODEL = ModelConfig(vocab_size=64, hidden=16, layers=LAYERS, norm_eps=1e-6, max_positions=16)
SLOTS, CHUNK, CAPACITY, POSITIONS = 2, 4, 10, 8
FILLED = 16
"""Rows of all shards together: few enough for packing them to pay."""
PAD_TOKEN = 0
"""What `pack` puts into pad rows."""


PROMPTS = [[3, 5, 7, 9, 11, 13], [2, 4, 6], [1], [10, 20, 30, 40, 50, 60, 8, 9]]
"""Two chunks of unlike lengths, the second without two of the sequences."""


def token_shards(where: str) -> int:
    return placement(where).size(Role.TOKENS)


def ends(where: str) -> list[Seat]:
    """For two sequences on the first shard and two on the last; those between are idle."""
    last = token_shards(where) - 1
    return [Seat(0, 0), Seat(0, 1), Seat(last, 0), Seat(last, 1)]


@cache
def decoder(where: str) -> ShardedDecoder:
    return ShardedDecoder(MODEL, placement(where), "float32")


@cache
def parameters(where: str) -> nnx.State:
    """Drawn once, on one device, which is quicker."""
    if where == "single":
        return decoder(where).init(0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, decoder(where).parameters)
    return jax.device_put(parameters("single"), shardings)


@cache
def program(where: str, strategy: type[Combine]) -> Wrapped:
    """`(parameters, caches, batch) -> logits of all rows, caches`, for any batch of at most `FILLED` rows."""
    made = decoder(where)
    if strategy is RaggedCombine:
        combine: Combine = RaggedCombine(made.placement, base=2, overflow=CAPACITY * made.placement.gather_shards)
    else:
        combine = strategy.sized(made.placement, [FILLED, *[0] * (token_shards(where) - 1)], CAPACITY)
    return jax.jit(lambda parameters, caches, batch: made.all_logits(parameters, caches, batch, Route.whole(combine)))


def packed(where: str, segments: Sequence[Segment]) -> tuple[Batch, list[int]]:
    return pack(segments, placement(where), slots=SLOTS, chunk=CHUNK, capacity=CAPACITY)


def arguments(where: str, segments: Sequence[Segment]) -> tuple[nnx.State, Caches, Batch]:
    """Of `program`, for a first step."""
    return parameters(where), decoder(where).empty_caches(SLOTS, POSITIONS), packed(where, segments)[0]


def run(
    where: str,
    strategy: type[Combine],
    prompts: Sequence[Sequence[int]],
    seats: Sequence[Seat],
    with_parameters: nnx.State | None = None,
) -> tuple[list[np.ndarray], Caches]:
    """The logits after each token of each prompt, taken in chunks, and the caches in the end."""
    weights, caches, _ = arguments(where, [])
    parts: list[list[np.ndarray]] = [[] for _ in prompts]
    for segments in prefill_steps(prompts, seats, CHUNK):
        batch, first_rows = packed(where, segments)
        logits, caches = program(where, strategy)(with_parameters or weights, caches, batch)
        for segment, first in zip(segments, first_rows, strict=True):
            parts[segment.request].append(np.asarray(logits)[first : first + len(segment.tokens)])
    return [np.concatenate(rows) for rows in parts], caches


@cache
def alone(prompt: tuple[int, ...]) -> np.ndarray:
    """The logits of a prompt that has one device to itself."""
    (logits,), _ = run("single", ReduceCombine, [prompt], [Seat(0, 0)])
    return logits


def assert_as_alone(
    where: str, strategy: type[Combine], prompts: Sequence[Sequence[int]], seats: Sequence[Seat]
) -> None:
    """Log-probabilities are those of each prompt alone, to a ten-thousandth of a nat."""
    logits, _ = run(where, strategy, prompts, seats)
    for got, prompt in zip(logits, prompts, strict=True):
        expected = log_softmax(alone(tuple(prompt)), axis=-1)
        np.testing.assert_allclose(log_softmax(got, axis=-1), expected, rtol=0, atol=1e-4)
