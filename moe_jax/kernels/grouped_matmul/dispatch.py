"""A matmul per group of rows, with work that grows with the rows and not with the number of groups.

M  rows, group after group     G  groups     D  inputs     F  outputs
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul
from moe_jax.kernels.grouped_matmul.pallas import PallasGroupedMatmul
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.mesh import Device


class GroupedMatmul(Protocol):
    """How a kind of device does it. Rows beyond the groups may hold anything, and come out as anything."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        """`rows @ weights.part(g)` for the rows of each group g."""
        ...

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        """`rows[g].T @ grad[g]` for each group g."""
        ...


@dataclass(frozen=True)
class RaggedDotGroupedMatmul:
    """By XLA, whose TPU backend has kernels for it; its others multiply every row with every group's weights."""

    def product(self, rows: Array, weights: StackedWeight, sizes: Array) -> Array:
        return jax.lax.ragged_dot(rows, weights.whole(), sizes)

    def outer(self, rows: Array, grad: Array, sizes: Array) -> Array:
        contracting = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(rows, grad, sizes, contracting)


def grouped_matmul_on(device: Device, expected: int = 1) -> GroupedMatmul:
    """The way to do it in programs compiled for a device, whether or not there is one.

    Args:
      expected: one row in so many is thought to belong to a group; the others lie beyond them.
    """
    match device.platform:
        case "cpu":
            return LoopGroupedMatmul(expected)
        case "tpu":
            return RaggedDotGroupedMatmul()
        case _:
            return PallasGroupedMatmul(expected)


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G D F"],
    group_sizes: Int32[Array, "G"],
    backend: GroupedMatmul,
    stacked: StackedWeight | None = None,
) -> Float[Array, "M F"]:
    """`rows @ weights[g]` for the rows of each group g, which follow each other in order.

    Rows beyond the sum of `group_sizes` may hold anything; their output is zero. Differentiable in rows and weights.

    Args:
      by: how to, as `grouped_matmul_on` the device says that the program is compiled for.
      in_place: the same weights in their stack, from which they need not be cut then.
    """
    rows, weights, group_sizes = vary_alike(rows, weights, group_sizes)
    return _grouped_matmul(backend, rows, weights, group_sizes, stacked or StackedWeight.of_one(weights))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    backend: GroupedMatmul, rows: Array, weights: Array, group_sizes: Array, stacked: StackedWeight
) -> Array:
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
