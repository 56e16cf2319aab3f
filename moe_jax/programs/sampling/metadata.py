"""Sampling parameters of many requests, as arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from moe_jax.config.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_IDS, SamplingParams
from moe_jax.programs.sampling.vocab_shard import NO_TOKEN
from moe_jax.sharding.rows import on_host

INT32_MAX = np.iinfo(np.int32).max
"""Upper bound of `top_k` and `min_tokens` in arrays: more than any vocabulary or sequence has."""


class SamplingRequest(Protocol):
    """The attributes of a request that sampling reads."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def seed(self) -> int: ...

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def stop_ids(self) -> Collection[int]:
        """Token ids that end the request: the model's and the request's own."""
        ...


class SamplingMetadata(NamedTuple):
    """Sampling parameters of Q requests, as arrays."""

    temperature: Float[Array, "Q"]
    top_k: Int32[Array, "Q"]
    top_p: Float[Array, "Q"]
    min_p: Float[Array, "Q"]
    repetition_penalty: Float[Array, "Q"]
    presence_penalty: Float[Array, "Q"]
    frequency_penalty: Float[Array, "Q"]
    seed: UInt32[Array, "Q"]
    min_tokens: Int32[Array, "Q"]
    prompt_length: Int32[Array, "Q"]
    bias_ids: Int32[Array, "Q biases"]
    """Tokens that `logit_bias` names, padded with `NO_TOKEN`."""
    bias_values: Float[Array, "Q biases"]
    """Biases of these tokens, padded with 0."""
    stop_ids: Int32[Array, "Q stops"]
    """The first `MAX_STOP_IDS` tokens that end a request and that `min_tokens` holds back, padded with `NO_TOKEN`."""

    @classmethod
    def of(cls, requests: Sequence[SamplingRequest | None]) -> SamplingMetadata:
        """Collect the parameters of requests; `None` becomes a greedy one. All shapes depend on Q alone."""
        rows = [_row(request) for request in requests]
        return cls(**{name: on_host(np.array([row[name] for row in rows], dtype)) for name, dtype in _DTYPES.items()})


class SamplerInputs(NamedTuple):
    """Inputs of sampling besides the logits."""

    sampling: SamplingMetadata
    generated: Int32[Array, "Q"]
    """Number of tokens that each request has generated."""
    history: Int32[Array, "Q P"] | None
    """Tokens of each request by position: the prompt, then the generated tokens; later columns are undefined.
    `None` if no request has a penalty."""


_DTYPES: dict[str, type[np.generic]] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "seed": np.uint32,
    "min_tokens": np.int32,
    "prompt_length": np.int32,
    "bias_ids": np.int32,
    "bias_values": np.float32,
    "stop_ids": np.int32,
}


class _GreedyRequest(NamedTuple):
    """Stand-in for a missing request."""

    params: SamplingParams = SamplingParams(temperature=0)
    seed: int = 0
    prompt: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()


def _row(request: SamplingRequest | None) -> dict[str, Any]:
    """Fields of `SamplingMetadata` for one request."""
    request = request or _GreedyRequest()
    params, bias = request.params, request.params.logit_bias or {}
    return {
        "temperature": params.temperature,
        "top_k": min(params.top_k, INT32_MAX),
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "seed": request.seed,
        "min_tokens": min(params.min_tokens, INT32_MAX),
        "prompt_length": len(request.prompt),
        "bias_ids": _padded(bias, MAX_LOGIT_BIASES, NO_TOKEN),
        "bias_values": _padded(bias.values(), MAX_LOGIT_BIASES, 0),
        "stop_ids": _padded(sorted(request.stop_ids)[:MAX_STOP_IDS], MAX_STOP_IDS, NO_TOKEN),
    }


def _padded(values: Collection[float], width: int, fill: int) -> np.ndarray:
    padded = np.full(width, fill, np.float64)
    padded[: len(values)] = list(values)
    return padded
