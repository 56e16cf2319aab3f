"""Grouped matmuls: the choice of a backend, and the gradient that all backends share.

M  rows, group after group     G  groups     D  inputs     F  outputs
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul
from moe_jax.kernels.grouped_matmul.pallas import PallasGroupedMatmul
from moe_jax.kernels.grouped_matmul.ragged_dot import RaggedDotGroupedMatmul
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.mesh import Device


class GroupedMatmul(Protocol):
    """Backend of `grouped_matmul`. Rows beyond the groups may hold anything, and so may their outputs."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        """Compute `rows @ weights.group(g)` for the rows of each group g."""
        ...

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        """Compute `rows[g].T @ grad[g]` for each group g."""
        ...


def grouped_matmul_on(device: Device, shards: int = 1) -> GroupedMatmul:
    """Choose the backend for programs compiled for a device, which need not be attached.

    Args:
      shards: number of devices that the groups are split over: about one row in `shards` belongs to a group held here,
        and the others lie beyond the groups.
    """
    match device.platform:
        case "cpu":
            return LoopGroupedMatmul(shards)
        case "tpu":
            return RaggedDotGroupedMatmul()
        case _:
            return PallasGroupedMatmul(shards)


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G D F"],
    group_sizes: Int32[Array, "G"],
    backend: GroupedMatmul,
    stacked: StackedWeight | None = None,
) -> Float[Array, "M F"]:
    """Compute `rows @ weights[g]` for the rows of each group g, which follow each other in order.

    Rows beyond the sum of `group_sizes` may hold anything; their output is zero. Differentiable in rows and weights.

    Args:
      backend: implementation, as `grouped_matmul_on` chooses it.
      stacked: the same weights in their stack of layers, so that the layer need not be copied out of it.
    """
    rows, weights, group_sizes = vary_alike(rows, weights, group_sizes)
    return _grouped_matmul(backend, rows, weights, group_sizes, stacked or StackedWeight.of_one(weights))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    backend: GroupedMatmul, rows: Array, weights: Array, group_sizes: Array, stacked: StackedWeight
) -> Array:
    """Compute the products of inputs that vary over the same mesh axes, as a custom gradient needs them."""
    del weights
    out = vary_alike(backend.product(rows, stacked, group_sizes), rows)[0]
    return jnp.where((jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None], out, 0)


def _forward(backend: GroupedMatmul, *args: Any) -> tuple[Array, tuple[Array, ...]]:
    return _grouped_matmul(backend, *args), args[:3]


def _backward(backend: GroupedMatmul, saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, None, None]:
    rows, weights, group_sizes = saved
    grad_rows = grouped_matmul(grad, weights.swapaxes(1, 2), group_sizes, backend)
    return grad_rows, vary_alike(backend.outer(rows, grad, group_sizes), rows)[0], None, None


_grouped_matmul.defvjp(_forward, _backward)
