"""Norms of rows and of heads.

T  rows     D  hidden     H  heads of this device     d  head width
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import Norm
from moe_jax.layers import parameter
from moe_jax.layers.parameter import HeadNumber, take_head
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.collectives import sum_devices


class RMSNorm(nnx.Module):
    """Scale the last dimension to unit mean square, then by a weight (Zhang and Sennrich, arXiv:1910.07467).

    Sums in float32. With `around_one`, the factor is one more than the weight.
    """

    def __init__(self, width: int, eps: float, *, around_one: bool = False, dtype: DTypeLike) -> None:
        self.eps, self.around_one = eps, around_one
        self.weight = (parameter.zeros if around_one else parameter.ones)((width,), (None,), dtype=dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        unit, weight = _unit(x, _mean_square(x, -1), self.eps), self.weight[...]
        return (unit * (1 + weight.astype(jnp.float32))).astype(x.dtype) if self.around_one else unit * weight


class LayerNorm(nnx.Module):
    """Shift the last dimension to zero mean, scale it to unit variance, then by a weight (Ba et al., arXiv:1607.06450).

    Sums in float32.
    """

    def __init__(self, width: int, eps: float, *, bias: bool, dtype: DTypeLike) -> None:
        self.eps = eps
        self.weight = parameter.ones((width,), (None,), dtype=dtype)
        self.bias = parameter.zeros((width,), (None,), dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        out = _unit(centered, _mean_square(centered, -1), self.eps).astype(x.dtype) * self.weight[...]
        return out if self.bias is None else out + self.bias[...]


def row_norm(norm: Norm, width: int, eps: float, *, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """Create the norm of rows that a model config asks for."""
    if norm in (Norm.RMS, Norm.RMS_AROUND_ONE):
        return RMSNorm(width, eps, around_one=norm is Norm.RMS_AROUND_ONE, dtype=dtype)
    return LayerNorm(width, eps, bias=norm is Norm.LAYER_WITH_BIAS, dtype=dtype)


class HeadNorm(RMSNorm):
    """RMS norm of each head."""

    def __call__(
        self, x: Float[Array, "T H d"], placement: Placement | None = None, head: HeadNumber | None = None
    ) -> Float[Array, "T H d"]:
        return super().__call__(x)


class UnitHeadNorm(nnx.Module):
    """RMS norm of each head, without a weight."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(
        self, x: Float[Array, "T H d"], placement: Placement, head: HeadNumber | None = None
    ) -> Float[Array, "T H d"]:
        return _unit(x, _mean_square(x, -1), self.eps)


class ProjectionNorm(nnx.Module):
    """RMS norm over all heads together, across devices."""

    def __init__(self, heads: int, head_dim: int, eps: float, split: Role, *, dtype: DTypeLike) -> None:
        self.eps = eps
        self.weight = parameter.ones((heads, head_dim), (split, None), dtype=dtype)

    def __call__(
        self, x: Float[Array, "T H d"], placement: Placement, head: HeadNumber | None = None
    ) -> Float[Array, "T H d"]:
        """Normalize heads. Devices that share one head each count it, and so all heads are counted equally often."""
        total = sum_devices(_mean_square(x, (-2, -1)), placement.axes(Role.HEADS))
        mean_square = total / placement.size(Role.HEADS)
        return _unit(x, mean_square, self.eps) * take_head(self.weight[...], head, axis=0)


class GroupNorm(nnx.Module):
    """RMS norm over groups of neighbouring heads; a group may extend over several devices."""

    def __init__(self, groups: int, heads: int, head_dim: int, eps: float, *, dtype: DTypeLike) -> None:
        self.groups, self.eps = groups, eps
        self.weight = parameter.ones((heads, head_dim), (Role.HEADS, None), dtype=dtype)

    def __call__(self, x: Float[Array, "T H d"], placement: Placement) -> Float[Array, "T H d"]:
        mean_square, devices = _mean_square(x, -1), placement.size(Role.HEADS)
        if devices <= self.groups:
            grouped = mean_square.reshape(x.shape[0], self.groups // devices, -1)
            group_means = jnp.mean(grouped, axis=-1, keepdims=True)
            mean_square = jnp.broadcast_to(group_means, grouped.shape).reshape(mean_square.shape)
        else:
            sharers = devices // self.groups
            group = placement.index(Role.HEADS) // sharers
            part = jnp.where(jnp.arange(self.groups) == group, jnp.mean(mean_square[..., 0], axis=1, keepdims=True), 0)
            group_means = sum_devices(part, placement.axes(Role.HEADS)) / sharers
            mean_square = lax.dynamic_slice_in_dim(group_means, group, 1, axis=1)[:, None]
        return _unit(x, mean_square, self.eps) * self.weight[...]


def _mean_square(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    wide = x.astype(jnp.float32)
    return jnp.mean(wide * wide, axis=axis, keepdims=True)


def _unit(x: Float[Array, "..."], mean_square: Float[Array, "..."], eps: float) -> Float[Array, "..."]:
    return (x.astype(jnp.float32) * lax.rsqrt(mean_square + eps)).astype(x.dtype)
