"""Softmax over cached positions, which come a block at a time, in one pass (Milakov and Gimelshein, arXiv:1805.02867).

S  lines of a grid     C  their chunk     n  positions of a block
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
"""The scores of a block's positions, in float32, and the values there."""
MaskFn: TypeAlias = Callable[[Int32[Array, "S n"]], Bool[Array, "S C n"]]
"""Of positions, those that each row may look at."""


class SoftmaxState(NamedTuple):
    """Over the positions so far, as multiples of the exponential of the highest score."""

    highest: Float[Array, "K S G C 1"]
    weights: Float[Array, "K S G C 1"]
    values: Float[Array, "K S G C v"]


def weighted_values(
    query: Float[Array, "S C H d"],
    cached: CachedKV,
    look: ScoreFn,
    seen: MaskFn,
    value_shape: tuple[int, int],
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "S C H v"]:
    """Values weighted by the softmax of the scores; zero for a row that sees nothing.

    Args:
      value_shape: K and v.
      sinks: one more score for each head, that goes to no value (Xiao et al., arXiv:2309.17453).
    """

    def take(block: KVBlock, sums: SoftmaxState) -> SoftmaxState:
        scores, values = look(block)
        scores = jnp.where(seen(block.positions)[:, None], scores, -jnp.inf)
        highest = lax.stop_gradient(jnp.maximum(sums.highest, jnp.max(scores, axis=-1, keepdims=True)))
        level = jnp.where(jnp.isfinite(highest), highest, 0)
        before, weights = jnp.exp(sums.highest - level), jnp.exp(scores - level)
        weighted = jnp.einsum(
            "ksgcn,ksnv->ksgcv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        total = before * sums.weights + jnp.sum(weights, axis=-1, keepdims=True)
        return SoftmaxState(highest, total, before * sums.values + weighted)

    segments, chunk, heads, _ = query.shape
    sums = cached.fold(take, _start(query, value_shape, sinks))
    out = sums.values / jnp.where(sums.weights > 0, sums.weights, 1)
    return jnp.moveaxis(out, 3, 1).swapaxes(0, 2).reshape(segments, chunk, heads, -1).astype(query.dtype)


def _start(
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
