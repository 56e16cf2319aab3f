"""Grouped-query attention (Ainslie et al., arXiv:2305.13245) over a cache, on the heads that this device holds.

T  rows   D  hidden   H  query heads, K  KV heads of this device   d  head width
S  lines of a grid   C  their chunk   n  positions of a block   G  H / K   v  width of values
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import AttentionConfig, Norm, OutputGate, QKNorm, Window
from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.kernels.kv_cache import CachedKV, KVBlock, KVCache
from moe_jax.kernels.online_softmax import MaskFn, weighted_values
from moe_jax.kernels.query_scaling import query_scale
from moe_jax.kernels.rope import Rotary
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.norm import HeadNorm, ProjectionNorm, UnitHeadNorm
from moe_jax.layers.parameter import HeadNumber, once, one_head, only_head, product
from moe_jax.sharding import PartialSum, Placement, Role

C = TypeVar("C", bound=KVCache)


class HeadProjection(nnx.Module):
    """Rows to heads: `[T, D] -> [T, H, d]`."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        split: Role,
        *,
        bias: bool,
        exact: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """An `exact` one is small, and never held in eight bits."""
        shape, dims = (hidden, heads, head_dim), (None, split, None)
        self.weight = parameter.matrix(rngs, shape, dims, inputs=(0,), dtype=dtype, exact=exact)
        self.bias = parameter.zeros((heads, head_dim), (split, None), dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"], only: HeadNumber | None = None) -> Float[Array, "T H d"]:
        """All heads held here, or only one of them."""
        out = product("td,dhk->thk", x, self.weight, partial(one_head, only=only, axis=1))
        return out if self.bias is None else out + one_head(self.bias[...], only, axis=0)


class Attention(nnx.Module):
    def __init__(
        self, config: AttentionConfig, hidden: int, norm: Norm, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.config = config
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

    def __call__(self, x: Float[Array, "T D"], step: Step, cache: C, layer: Int32[Array, ""]) -> tuple[PartialSum, C]:
        """This device's heads' part of the output, and the cache with the rows' keys and values written."""
        batch, placement = step.batch, step.residual.placement
        query, key, value = self._project(x, step)
        view, cache = cache.write(layer, key, value, batch, self.config.window)
        with jax.named_scope("attend"):
            out = batch.to_rows([self._attend(query, view(layout), layout, batch) for layout in batch.layouts])
        if self.gate is not None:
            out *= jax.nn.sigmoid(self.gate(x))
        part = product("thv,hvd->td", out, self.output)
        if self.output_bias is not None:
            part += once(self.output_bias[...], placement, Role.HEADS)
        return step.residual.heads_partial_sum(part), cache

    def _project(
        self, x: Float[Array, "T D"], step: Step
    ) -> tuple[Float[Array, "T H d"], Float[Array, "T K d"], Float[Array, "T K v"]]:
        """Queries, keys and values, as they meet."""
        placement = step.residual.placement
        only = only_head(self.config.kv_heads, placement)
        query, key, value = self.query(x), self.key(x, only), self.value(x, only)
        rotated_first = self.config.qk_norm in (QKNorm.ROTATED_HEAD, QKNorm.ROTATED_UNIT)
        if not rotated_first:
            query, key = self._normalise(query, key, placement, only)
        if self.config.clip is not None:
            query, key, value = (jnp.clip(part, -self.config.clip, self.config.clip) for part in (query, key, value))
        if self.rotary is not None:
            query, key = step.rotate(query, self.rotary), step.rotate(key, self.rotary)
        if rotated_first:
            query, key = self._normalise(query, key, placement, only)
        if self.config.query_scaling is not None:
            query = (query * query_scale(self.config.query_scaling, step.batch.positions)).astype(query.dtype)
        return query, key, value * self.config.value_scale

    def _normalise(
        self,
        query: Float[Array, "T H d"],
        key: Float[Array, "T K d"],
        placement: Placement,
        only: HeadNumber | None,
    ) -> tuple[Float[Array, "T H d"], Float[Array, "T K d"]]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query, placement), self.key_norm(key, placement, only)

    def _attend(
        self, query: Float[Array, "T H d"], cached: CachedKV, layout: QueryLayout, batch: ForwardBatch
    ) -> Float[Array, "S C H v"]:
        """Each row sees the positions up to the last of its block, which may be its own, within the window."""
        config = self.config
        sinks = None if self.sinks is None else self.sinks[...]

        def of_segments(cached: CachedKV, query: Float[Array, "S C H d"], own: Int32[Array, "S C"]) -> Array:
            last = last_seen(own[..., None], config.block)

            def seen(positions: Int32[Array, "S n"]) -> Bool[Array, "S C n"]:
                before = positions[:, None] <= last
                if config.window is None:
                    return before
                return before & (positions[:, None] >= first_seen(own[..., None], config.window, config.window_kind))

            return attend(query, cached, seen, self.scale, sinks)

        return cached.map_segments(
            of_segments, batch.to_padded(query, layout), batch.to_padded(batch.positions, layout)
        )


def output_gate(
    gate: OutputGate | None, hidden: int, heads: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> HeadProjection | None:
    """What, after a sigmoid, multiplies the output of heads of this width."""
    if gate is None:
        return None
    width = 1 if gate is OutputGate.HEAD else width
    return HeadProjection(hidden, heads, width, Role.HEADS, bias=False, dtype=dtype, rngs=rngs)


def _qk_norms(
    config: AttentionConfig, norm: Norm, eps: float, *, dtype: DTypeLike
) -> (
    tuple[HeadNorm, HeadNorm]
    | tuple[UnitHeadNorm, UnitHeadNorm]
    | tuple[ProjectionNorm, ProjectionNorm]
    | tuple[None, None]
):
    """Those of queries and of keys."""
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


def last_seen(own: Int32[Array, "..."], block: int) -> Int32[Array, "..."]:
    """The last position that a row sees from its own."""
    return own if block == 1 else own // block * block + block - 1


def first_seen(own: Int32[Array, "..."], window: int, kind: Window) -> Int32[Array, "..."]:
    """The first position that a row sees from its own."""
    match kind:
        case Window.SLIDING:
            return own - window + 1
        case Window.CHUNKED:
            return own // window * window


def attend(
    query: Float[Array, "S C H d"],
    cached: CachedKV,
    seen: MaskFn,
    scale: float,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "S C H v"]:
    """Softmax attention; each KV head serves `H / K` neighbouring query heads."""

    def look(block: KVBlock) -> tuple[Array, Array]:
        return products(query, block.keys) * scale, block.values

    return weighted_values(query, cached, look, seen, cached.value_shape, sinks)


def products(query: Float[Array, "S C H d"], keys: Float[Array, "K S n d"]) -> Float[Array, "K S G C n"]:
    """Of each query with the keys of its KV head, in float32."""
    segments, chunk, _, width = query.shape
    grouped = query.reshape(segments, chunk, keys.shape[0], -1, width)
    return jnp.einsum("sckgd,ksnd->ksgcn", grouped, keys, preferred_element_type=jnp.float32)
