"""Grouped-query attention (Ainslie et al., arXiv:2305.13245) over a cache, on the heads that this device holds.

T  rows   D  hidden   H  query heads, K  KV heads of this device   d  head width
S  lines of a grid   C  their chunk   N  cached positions of a line
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import AttentionConfig
from moe_jax.layers import parameter
from moe_jax.layers.cache import Cache, Cached
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.rope import rotate
from moe_jax.layers.step import Grid, Packing, Step
from moe_jax.sharding import PartialSum, Placement, Role

C = TypeVar("C", bound=Cache)
HeadNumber = Int32[Array, ""] | int


class HeadProjection(nnx.Module):
    """Rows to heads: `[T, D] -> [T, H, d]`."""

    def __init__(
        self, hidden: int, heads: int, head_dim: int, split: Role, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.weight = parameter.normal(rngs, (hidden, heads, head_dim), (None, split, None), fan_in=hidden, dtype=dtype)
        self.bias = parameter.zeros((heads, head_dim), (split, None), dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"], only: HeadNumber | None = None) -> Float[Array, "T H d"]:
        """All heads held here, or only one of them."""
        out = jnp.einsum("td,dhk->thk", x, _head(self.weight[...], only, axis=1))
        return out if self.bias is None else out + _head(self.bias[...], only, axis=0)


class Attention(nnx.Module):
    def __init__(self, config: AttentionConfig, hidden: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, kv_heads, width = config.heads, config.kv_heads, config.head_dim
        like = {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        self.query = HeadProjection(hidden, heads, width, Role.HEADS, **like)
        self.key = HeadProjection(hidden, kv_heads, width, Role.KV_HEADS, **like)
        self.value = HeadProjection(hidden, kv_heads, width, Role.KV_HEADS, **like)
        self.query_norm = RMSNorm(width, eps, dtype=dtype) if config.qk_norm else None
        self.key_norm = RMSNorm(width, eps, dtype=dtype) if config.qk_norm else None
        self.output = parameter.normal(
            rngs, (heads, width, hidden), (Role.HEADS, None, None), fan_in=heads * width, dtype=dtype
        )

    def __call__(self, x: Float[Array, "T D"], step: Step, cache: C, layer: Int32[Array, ""]) -> tuple[PartialSum, C]:
        """This device's heads' part of the output, and the cache with the rows' keys and values written."""
        packing, only = step.packing, self._only_kv_head(step.residual.placement)
        query, key, value = self.query(x), self.key(x, only), self.value(x, only)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query = rotate(query, packing.positions, self.config.rope_theta)
        key = rotate(key, packing.positions, self.config.rope_theta)
        view, cache = cache.write(layer, key, value, packing, self.config.window)
        with jax.named_scope("attend"):
            out = packing.to_rows([self._attend(query, view(grid), grid, packing) for grid in packing.grids])
        return step.residual.heads_partial_sum(jnp.einsum("thk,hkd->td", out, self.output[...])), cache

    def _attend(
        self, query: Float[Array, "T H d"], cached: Cached, grid: Grid, packing: Packing
    ) -> Float[Array, "S C H d"]:
        """Each row sees the positions up to its own, within the window."""
        own, positions = packing.to_grid(packing.positions, grid)[..., None], cached.positions[:, None]
        seen = positions <= own
        if self.config.window is not None:
            seen &= positions > own - self.config.window
        return attend(packing.to_grid(query, grid), cached.keys, cached.values, seen)

    def _only_kv_head(self, placement: Placement) -> HeadNumber | None:
        """The one KV head that this device's query heads share, where there are fewer KV heads than devices."""
        devices, kv_heads = placement.size(Role.HEADS), self.config.kv_heads
        return None if devices <= kv_heads else placement.index(Role.HEADS) // (devices // kv_heads)


def attend(
    query: Float[Array, "S C H d"],
    keys: Float[Array, "K S N d"],
    values: Float[Array, "K S N d"],
    seen: Bool[Array, "S C N"],
) -> Float[Array, "S C H d"]:
    """Softmax attention; each KV head serves `H / K` neighbouring query heads. Scores and softmax are float32."""
    lines, chunk, heads, width = query.shape
    grouped = query.reshape(lines, chunk, keys.shape[0], -1, width)
    scores = jnp.einsum("sckgd,ksnd->ksgcn", grouped, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None], scores * width**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("ksgcn,ksnd->sckgd", weights, values).reshape(lines, chunk, heads, width)


def _head(weight: Array, only: HeadNumber | None, *, axis: int) -> Array:
    return weight if only is None else lax.dynamic_slice_in_dim(weight, only, 1, axis)
