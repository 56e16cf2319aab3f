"""Grouped matmuls of many rows on Hopper GPUs, by the kernel that JAX has for them.

M  rows, group after group     G  groups     D  inputs     F  outputs
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float, Int32

from moe_jax.layers.grouped_tiles import Tiles
from moe_jax.layers.parameter import InPlace

ROWS, OUTPUTS, INPUTS, STEPS = 64, 128, 64, 4
"""Of a tile; and how many steps over the inputs are loaded ahead."""

OTHERWISE = Tiles()


@dataclass(frozen=True)
class Hopper:
    """With the asynchronous copies and warpgroup matmuls of these GPUs, which take tiles of at least 64 rows, two bytes
    a number, and sizes that divide; all else is computed by `Tiles`."""

    def product(self, rows: Float[Array, "M D"], weights: InPlace, sizes: Int32[Array, "G"]) -> Float[Array, "M F"]:
        if not fits(rows, weights):
            return OTHERWISE.product(rows, weights, sizes)
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot  # imports what only it needs

        return ragged_dot(
            rows,
            weights.whole(),
            group_sizes=sizes,
            block_m=ROWS,
            block_n=OUTPUTS,
            block_k=INPUTS,
            max_concurrent_steps=STEPS,
            grid_block_n=1,
        )

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        return OTHERWISE.outer(rows, grad, sizes)


def fits(rows: Array, weights: InPlace) -> bool:
    """Whether the kernel takes these, and an even share of the rows fills its tiles."""
    (count, inputs), (_, groups, _, outputs) = rows.shape, weights.stack.shape
    whole = inputs % INPUTS == outputs % OUTPUTS == 0
    return whole and rows.dtype == weights.stack.dtype and rows.dtype.itemsize == 2 and count >= groups * ROWS
