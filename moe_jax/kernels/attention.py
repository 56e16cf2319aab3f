"""Grouped-query attention (Ainslie et al., arXiv:2305.13245) over cached keys and values, and its masks.

S  segments     C  rows of a segment     n  positions of a block
H  query heads     K  KV heads, G  query heads of each     d, v  widths of queries and values
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.config import Window
from moe_jax.kernels.kv_cache import CachedKV, KVBlock
from moe_jax.kernels.online_softmax import MaskFn, online_softmax


def grouped_query_attention(
    query: Float[Array, "S C H d"],
    cached: CachedKV,
    mask: MaskFn,
    scale: float,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "S C H v"]:
    """Softmax attention in which each KV head serves G neighbouring query heads."""

    def score(block: KVBlock) -> tuple[Array, Array]:
        return query_key_products(query, block.keys) * scale, block.values

    return online_softmax(query, cached, score, mask, cached.value_shape, sinks)


def query_key_products(query: Float[Array, "S C H d"], keys: Float[Array, "K S n d"]) -> Float[Array, "K S G C n"]:
    """Multiply each query with the keys of its KV head, in float32."""
    segments, chunk, _, width = query.shape
    grouped = query.reshape(segments, chunk, keys.shape[0], -1, width)
    return jnp.einsum("sckgd,ksnd->ksgcn", grouped, keys, preferred_element_type=jnp.float32)


def causal_mask(
    query_positions: Int32[Array, "S C"], block: int = 1, window: int | None = None, kind: Window = Window.SLIDING
) -> MaskFn:
    """Mask positions after a row's block, or before its window.

    Args:
      query_positions: position of each row.
      block: rows of a block attend to each other; 1 for autoregressive models.
      window: width of the window; `None` for none.
    """
    last = _last_position(query_positions[..., None], block)

    def mask(key_positions: Int32[Array, "S n"]) -> Array:
        causal = key_positions[:, None] <= last
        if window is None:
            return causal
        return causal & (key_positions[:, None] >= first_position(query_positions[..., None], window, kind))

    return mask


def first_position(position: Int32[Array, "..."], window: int, kind: Window) -> Int32[Array, "..."]:
    """First position in a row's window."""
    match kind:
        case Window.SLIDING:
            return position - window + 1
        case Window.CHUNKED:
            return position // window * window


def _last_position(position: Int32[Array, "..."], block: int) -> Int32[Array, "..."]:
    """Last position of a row's block."""
    return position if block == 1 else position // block * block + block - 1
