"""Grouped matmuls by `jax.lax.ragged_dot`.

M  rows, group after group     G  groups     D  inputs     F  outputs
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.stacked_weight import StackedWeight


@dataclass(frozen=True)
class RaggedDotGroupedMatmul:
    """XLA's ragged dot: kernels on TPUs; on other devices, a product of every row with every group's weights."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        return jax.lax.ragged_dot(rows, weights.whole(), sizes)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        contracting = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(rows, grad, sizes, contracting)
