"""From logits to the next token, for many requests at once, each with its own parameters.

S  requests     V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from moe_jax.requests import SamplingParams
from moe_jax.sharding.rows import on_host

ALL = 2**31 - 1
"""More tokens than any vocabulary has."""


class Knobs(NamedTuple):
    """The parameters of S requests, as arrays."""

    temperature: Float[Array, "S"]
    top_k: Int32[Array, "S"]
    top_p: Float[Array, "S"]
    seed: UInt32[Array, "S"]
    generated: Int32[Array, "S"]
    """How many tokens the request has generated: with the seed, it determines the draw."""

    @classmethod
    def of(cls, requests: Sequence[tuple[SamplingParams, int, int]]) -> Knobs:
        """From each request's parameters, seed and number of generated tokens."""
        dtypes = (np.float32, np.int32, np.float32, np.uint32, np.int32)
        columns = zip(
            *((p.temperature, min(p.top_k, ALL), p.top_p, seed, made) for p, seed, made in requests), strict=True
        )
        return cls(*(on_host(np.array(column, dtype)) for column, dtype in zip(columns, dtypes, strict=True)))


class Sampled(NamedTuple):
    tokens: Int32[Array, "S"]
    logprobs: Float[Array, "S"]
    """Of the chosen tokens, under the unmodified logits."""


def sample(logits: Float[Array, "S V"], knobs: Knobs | None) -> Sampled:
    """The next token of each request: drawn where its temperature is above 0, else, and without knobs, the likeliest.

    A draw depends on nothing but the request's own logits and knobs.
    """
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if knobs is not None:
        tokens = jnp.where(knobs.temperature > 0, jax.vmap(_draw)(logits, knobs), tokens)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return Sampled(tokens, chosen - jax.nn.logsumexp(logits, axis=-1))


def _draw(logits: Float[Array, "V"], knobs: Knobs) -> Int32[Array, ""]:
    """One request's draw, by the Gumbel-max trick over the kept tokens, likeliest first."""
    order = jnp.argsort(logits, descending=True)
    scaled = logits[order] / jnp.where(knobs.temperature > 0, knobs.temperature, 1)
    rank = jnp.arange(logits.shape[0])
    scaled = jnp.where((knobs.top_k == 0) | (rank < knobs.top_k), scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled)
    likelier = jnp.cumsum(probabilities) - probabilities
    scaled = jnp.where((likelier < knobs.top_p) | (knobs.top_p == 1), scaled, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(knobs.seed), knobs.generated)
    return order[jnp.argmax(scaled + jax.random.gumbel(key, scaled.shape))].astype(jnp.int32)
