"""Grouped matmuls as XLA's CPU backend does them well: block by block.

M  rows, group after group     G  groups     D  inputs     F  outputs     B  rows of a block
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding.collectives import argsort, vary_alike

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 64

Part = TypeVar("Part")
Carry = TypeVar("Carry")


@dataclass(frozen=True)
class LoopGroupedMatmul:
    """A loop over blocks of rows of one group each (as MegaBlocks has them, arXiv:2211.15841), as many as the sizes
    leave at run time. `jax.lax.ragged_dot` multiplies every row with every group's weights on a CPU.

    Where such a loop ends, XLA's GPU programs are said to ask the host each round (not measured): see `grouped_tiles`.
    """

    expected: int = 1
    """One row in so many is thought to belong to a group."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        count = rows.shape[0]
        size = self.block_size(count, len(sizes))

        def visit(weight: Array, first: Array, own: Array, out: Array) -> Array:
            product = lax.dynamic_slice_in_dim(rows, first, size) @ weight
            before = lax.dynamic_slice_in_dim(out, first, size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], product, before), first, 0)

        out = _zeros((count, weights.stack.shape[-1]), rows)
        return visit_blocks(sizes, size, count, weights.part, visit, out)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        count, groups = rows.shape[0], sizes.shape[0]
        size = self.block_size(count, groups)

        def visit(group: Array, first: Array, own: Array, out: Array) -> Array:
            inputs, outputs = (
                jnp.where(own[:, None], lax.dynamic_slice_in_dim(x, first, size), 0) for x in (rows, grad)
            )
            return out.at[group].add(inputs.T @ outputs)

        zeros = _zeros((groups, rows.shape[1], grad.shape[1]), rows)
        return visit_blocks(sizes, size, count, lambda group: group, visit, zeros)

    def block_size(self, rows: int, groups: int) -> int:
        """A quarter more than an even share of the rows, so that few groups need two; within the limits."""
        smallest_blocks = math.ceil(1.25 * rows / (groups * self.expected) / SMALLEST_BLOCK)
        return min(max(smallest_blocks, 1) * SMALLEST_BLOCK, LARGEST_BLOCK, rows)


def visit_blocks(
    sizes: Int32[Array, "G"],
    size: int,
    rows: int,
    part: Callable[[Array], Part],
    visit: Callable[[Part, Int32[Array, ""], Bool[Array, "B"], Carry], Carry],
    carry: Carry,
) -> Carry:
    """`visit(part(g), first, own, carry)` for each block of `size` rows of each group g: the first of the rows to read,
    moved up to fit into all `rows`, and which of them are the block's own. Groups without rows cost nothing, and the
    others' part is made once."""
    with_rows, lasts = argsort(sizes == 0), jnp.cumsum(sizes)

    def of_group(i: Array, carry: Carry) -> Carry:
        group = with_rows[i]
        start, last, own_part = lasts[group] - sizes[group], lasts[group], part(group)

        def block(b: Array, carry: Carry) -> Carry:
            begin = start + b * size
            first = jnp.minimum(begin, rows - size)
            row = first + jnp.arange(size)
            return visit(own_part, first, (row >= begin) & (row < last), carry)

        return lax.fori_loop(0, (last - start + size - 1) // size, block, carry)

    return lax.fori_loop(0, jnp.sum(sizes > 0), of_group, carry)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return vary_alike(jnp.zeros(shape, like.dtype), like)[0]
