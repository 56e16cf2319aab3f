"""Softmax over cached positions, a block at a time, in one pass (Milakov and Gimelshein, arXiv:1805.02867).

S  segments     C  rows of a segment     n  positions of a block
H  query heads     K  KV heads, G  query heads of each     d, v  widths of queries and values
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.kernels.kv_cache import CachedKV, KVBlock
from moe_jax.sharding.collectives import vary_alike

ScoreFn: TypeAlias = Callable[[KVBlock], tuple[Float[Array, "K S G C n"], Float[Array, "K S n v"]]]
"""From a block to the scores of its positions, in float32, and the values there."""
MaskFn: TypeAlias = Callable[[Int32[Array, "S n"]], Bool[Array, "S C n"]]
"""From positions to a mask, true at those that each row attends to."""


class SoftmaxState(NamedTuple):
    """Sums over the positions so far, in multiples of `exp(highest)`."""

    highest: Float[Array, "K S G C 1"]
    """Highest score so far."""
    weights: Float[Array, "K S G C 1"]
    """Sum of the exponentials of the scores."""
    values: Float[Array, "K S G C v"]
    """Sum of the values, each times the exponential of its score."""


def online_softmax(
    query: Float[Array, "S C H d"],
    cached: CachedKV,
    score: ScoreFn,
    mask: MaskFn,
    value_shape: tuple[int, int],
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "S C H v"]:
    """Average cached values, weighted by the softmax of their scores; zero for a row that attends to no position.

    Args:
      value_shape: K and v.
      sinks: one more score for each head, without a value (Xiao et al., arXiv:2309.17453).
    """

    def update(block: KVBlock, state: SoftmaxState) -> SoftmaxState:
        scores, values = score(block)
        scores = jnp.where(mask(block.positions)[:, None], scores, -jnp.inf)
        highest = lax.stop_gradient(jnp.maximum(state.highest, jnp.max(scores, axis=-1, keepdims=True)))
        level = jnp.where(jnp.isfinite(highest), highest, 0)
        rescale, weights = jnp.exp(state.highest - level), jnp.exp(scores - level)
        weighted = jnp.einsum(
            "ksgcn,ksnv->ksgcv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        total = rescale * state.weights + jnp.sum(weights, axis=-1, keepdims=True)
        return SoftmaxState(highest, total, rescale * state.values + weighted)

    segments, chunk, heads, _ = query.shape
    state = cached.fold(update, _initial_state(query, value_shape, sinks))
    out = state.values / jnp.where(state.weights > 0, state.weights, 1)
    return jnp.moveaxis(out, 3, 1).swapaxes(0, 2).reshape(segments, chunk, heads, -1).astype(query.dtype)


def _initial_state(
    query: Float[Array, "S C H d"], value_shape: tuple[int, int], sinks: Float[Array, "H"] | None
) -> SoftmaxState:
    (segments, chunk, heads, _), (kv_heads, width) = query.shape, value_shape
    shape = (kv_heads, segments, heads // kv_heads, chunk)
    if sinks is None:
        highest, weights = jnp.full((*shape, 1), -jnp.inf), jnp.zeros((*shape, 1))
    else:
        scores = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(kv_heads, 1, -1, 1, 1), (*shape, 1))
        highest = lax.stop_gradient(scores)
        weights = jnp.exp(scores - highest)
    return SoftmaxState(*vary_alike(highest, weights, jnp.zeros((*shape, width)), query)[:3])
