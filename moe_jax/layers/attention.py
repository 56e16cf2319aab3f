"""Grouped-query attention (Ainslie et al., arXiv:2305.13245) over a cache, on the heads that this device holds.

T  rows     D  hidden     H  query heads, K  KV heads of this device     d, v  widths of queries and values
S  segments of a query layout     C  rows of a segment
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import AttentionConfig, Norm, QKNorm
from moe_jax.kernels.attention import causal_mask, grouped_query_attention
from moe_jax.kernels.kv_cache import CachedKV
from moe_jax.kernels.query_scaling import query_scale
from moe_jax.kernels.rope import Rotary
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.cached_attention import CachedAttention
from moe_jax.layers.norm import HeadNorm, ProjectionNorm, UnitHeadNorm
from moe_jax.layers.parameter import HeadNumber, shared_head
from moe_jax.layers.projection import HeadProjection, output_gate
from moe_jax.sharding import Placement, Role


class Attention(CachedAttention):
    """Grouped-query attention, with the norms, windows, sinks and gates that its config asks for."""

    def __init__(
        self, config: AttentionConfig, hidden: int, norm: Norm, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config, self.window = config, config.window
        heads, kv_heads, (width, value_width) = config.heads, config.kv_heads, config.cached_widths
        like = {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        self.query = HeadProjection(hidden, heads, width, Role.HEADS, **like)
        self.key = HeadProjection(hidden, kv_heads, width, Role.KV_HEADS, **like)
        self.value = HeadProjection(hidden, kv_heads, value_width, Role.KV_HEADS, **like)
        self.query_norm, self.key_norm = _qk_norms(config, norm, eps, dtype=dtype)
        self.rotary = Rotary(config.rope, width) if config.rope else None
        self.scale = config.scale or width**-0.5
        self.sinks = parameter.zeros((heads,), (Role.HEADS,), dtype=dtype) if config.sinks else None
        self.gate = output_gate(config.output_gate, hidden, heads, value_width, dtype=dtype, rngs=rngs)
        self.output = parameter.matrix(
            rngs, (heads, value_width, hidden), (Role.HEADS, None, None), inputs=(0, 1), dtype=dtype
        )
        self.output_bias = parameter.zeros((hidden,), (None,), dtype=dtype) if config.output_bias else None

    def _project(
        self, x: Float[Array, "T D"], step: Step
    ) -> tuple[Float[Array, "T H d"], Float[Array, "T K d"], Float[Array, "T K v"]]:
        placement = step.residual.placement
        head = shared_head(self.config.kv_heads, placement)
        query, key, value = self.query(x), self.key(x, head), self.value(x, head)
        norm_after_rope = self.config.qk_norm in (QKNorm.ROTATED_HEAD, QKNorm.ROTATED_UNIT)
        if not norm_after_rope:
            query, key = self._normalize(query, key, placement, head)
        if self.config.clip is not None:
            query, key, value = (jnp.clip(part, -self.config.clip, self.config.clip) for part in (query, key, value))
        if self.rotary is not None:
            query, key = step.rotate(query, self.rotary), step.rotate(key, self.rotary)
        if norm_after_rope:
            query, key = self._normalize(query, key, placement, head)
        if self.config.query_scaling is not None:
            query = (query * query_scale(self.config.query_scaling, step.batch.positions)).astype(query.dtype)
        return query, key, value * self.config.value_scale

    def _normalize(
        self,
        query: Float[Array, "T H d"],
        key: Float[Array, "T K d"],
        placement: Placement,
        head: HeadNumber | None,
    ) -> tuple[Float[Array, "T H d"], Float[Array, "T K d"]]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query, placement), self.key_norm(key, placement, head)

    def _attend(
        self, query: Float[Array, "S C H d"], cached: CachedKV, positions: Int32[Array, "S C"]
    ) -> Float[Array, "S C H v"]:
        config = self.config
        mask = causal_mask(positions, config.block, config.window, config.window_kind)
        return grouped_query_attention(query, cached, mask, self.scale, None if self.sinks is None else self.sinks[...])


def _qk_norms(
    config: AttentionConfig, norm: Norm, eps: float, *, dtype: DTypeLike
) -> (
    tuple[HeadNorm, HeadNorm]
    | tuple[UnitHeadNorm, UnitHeadNorm]
    | tuple[ProjectionNorm, ProjectionNorm]
    | tuple[None, None]
):
    """Create the norms of queries and of keys."""
    match config.qk_norm:
        case None:
            return None, None
        case QKNorm.PROJECTION:
            return (
                ProjectionNorm(config.heads, config.head_dim, eps, Role.HEADS, dtype=dtype),
                ProjectionNorm(config.kv_heads, config.head_dim, eps, Role.KV_HEADS, dtype=dtype),
            )
        case QKNorm.HEAD | QKNorm.ROTATED_HEAD:
            like = {"around_one": norm is Norm.RMS_AROUND_ONE, "dtype": dtype}
            return HeadNorm(config.head_dim, eps, **like), HeadNorm(config.head_dim, eps, **like)
        case QKNorm.ROTATED_UNIT:
            return UnitHeadNorm(eps), UnitHeadNorm(eps)
