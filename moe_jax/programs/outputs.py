"""Outputs of one dispatch.

L  segments of a token shard     K  tokens that a segment can emit     T  rows of a token shard
C  most likely tokens returned with each token     W = K * (2 + 2 C) + 1 words
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.models.decoder import Decoder
from moe_jax.programs.sampling import logprobs_of
from moe_jax.programs.step_input import StepInput
from moe_jax.sharding import Route
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.rows import on_host


class SampledTokens(NamedTuple):
    """Tokens that each segment emitted, with their log-probabilities."""

    tokens: Int32[Array, "L K"]
    logprobs: Float[Array, "L K"]
    top_tokens: Int32[Array, "L K C"]
    top_logprobs: Float[Array, "L K C"]
    counts: Int32[Array, "L"]
    """Number of tokens that each segment emitted; later columns are undefined."""

    @classmethod
    def empty(cls, like: Int32[Array, "L"], tokens: int, top: int) -> SampledTokens:
        """Allocate `tokens` columns for each segment. The arrays vary over the mesh axes that `like` varies over."""
        segments = like.shape[0]
        integers = jnp.zeros((segments, tokens), jnp.int32), jnp.zeros((segments, tokens, top), jnp.int32)
        floats = (part.astype(jnp.float32) for part in integers)
        (tokens_, top_tokens), (logprobs, top_logprobs) = integers, floats
        parts = vary_alike(tokens_, logprobs, top_tokens, top_logprobs, jnp.zeros(segments, jnp.int32), like)
        return cls(*parts[:-1])

    def pack(self) -> Int32[Array, "L W"]:
        """Pack all columns into one array: the host's cost of a read is per array, not per byte."""
        columns = (lax.bitcast_convert_type(part, jnp.int32).reshape(len(self.counts), -1) for part in self)
        return jnp.concatenate(list(columns), axis=1)

    @classmethod
    def unpack(cls, packed: np.ndarray, top: int) -> SampledTokens:
        """Invert `pack` on the host."""
        segments, words = packed.shape
        steps = (words - 1) // (2 + 2 * top)
        ends = np.cumsum([steps, steps, steps * top, steps * top])
        tokens, logprobs, top_tokens, top_logprobs, counts = np.split(packed, ends, axis=1)
        logprobs, top_logprobs = logprobs.view(np.float32), top_logprobs.view(np.float32)
        tops = (part.reshape(segments, steps, top) for part in (top_tokens, top_logprobs))
        return cls(*map(on_host, (tokens, logprobs, *tops, counts[:, 0])))


class RowLogprobs(NamedTuple):
    """Log-probabilities of the target of each row."""

    logprobs: Float[Array, "T"]
    top_tokens: Int32[Array, "T C"]
    top_logprobs: Float[Array, "T C"]
    logits: Float[Array, "T vocab"] | None


def row_logprobs(
    decoder: Decoder, hidden_states: Float[Array, "T D"], step_input: StepInput, route: Route
) -> RowLogprobs | None:
    """Compute the log-probabilities of the step's targets, or None if it has none."""
    if step_input.targets is None:
        return None
    with jax.named_scope("score"):
        vocabulary, residual, flags = decoder.vocabulary, route.residual, step_input.flags
        logits = vocabulary.logits(hidden_states)
        scored = logprobs_of(logits, step_input.targets, vocabulary.size, residual.placement, top=flags.top_logprobs)
        return RowLogprobs(*scored, logits=vocabulary.all_logits(hidden_states, residual) if flags.logits else None)
