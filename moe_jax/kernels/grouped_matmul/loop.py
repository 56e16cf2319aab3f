"""Grouped matmuls on CPUs: a loop over blocks of rows.

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

MIN_BLOCK, MAX_BLOCK = 8, 64
"""Limits of the rows of a block."""

Weights = TypeVar("Weights")
Carry = TypeVar("Carry")


@dataclass(frozen=True)
class LoopGroupedMatmul:
    """Loop over blocks of rows of one group each (MegaBlocks, arXiv:2211.15841), for group sizes known at run time.

    On a CPU, `jax.lax.ragged_dot` would multiply every row with every group's weights. On a GPU, XLA is said to ask the
    host in each round whether such a loop has ended (not measured); see `pallas`.
    """

    shards: int = 1
    """Number of devices that the groups are split over, as in `grouped_matmul_on`."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        count = rows.shape[0]
        size = self.block_size(count, len(sizes))

        def multiply(weight: Array, first: Array, valid: Array, out: Array) -> Array:
            product = lax.dynamic_slice_in_dim(rows, first, size) @ weight
            before = lax.dynamic_slice_in_dim(out, first, size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(valid[:, None], product, before), first, 0)

        out = _zeros((count, weights.stack.shape[-1]), rows)
        return loop_over_blocks(sizes, size, count, weights.group, multiply, out)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        count, groups = rows.shape[0], sizes.shape[0]
        size = self.block_size(count, groups)

        def add(group: Array, first: Array, valid: Array, out: Array) -> Array:
            inputs, outputs = (
                jnp.where(valid[:, None], lax.dynamic_slice_in_dim(x, first, size), 0) for x in (rows, grad)
            )
            return out.at[group].add(inputs.T @ outputs)

        zeros = _zeros((groups, rows.shape[1], grad.shape[1]), rows)
        return loop_over_blocks(sizes, size, count, lambda group: group, add, zeros)

    def block_size(self, rows: int, groups: int) -> int:
        """Choose the rows of a block: a quarter more than an even share, so that few groups need two blocks."""
        blocks = math.ceil(1.25 * rows / (groups * self.shards) / MIN_BLOCK)
        return min(max(blocks, 1) * MIN_BLOCK, MAX_BLOCK, rows)


def loop_over_blocks(
    sizes: Int32[Array, "G"],
    size: int,
    rows: int,
    weights_of: Callable[[Array], Weights],
    compute: Callable[[Weights, Int32[Array, ""], Bool[Array, "B"], Carry], Carry],
    carry: Carry,
) -> Carry:
    """Update `carry` by each block of rows of each group. Groups without rows cost nothing.

    Args:
      sizes: rows of each group.
      size: rows of a block.
      rows: number of all rows.
      weights_of: reads a group's weights, once per group.
      compute: `(weights, first, valid, carry) -> carry`, where the block is the rows from `first` on, moved up so that
        it ends within all rows, and `valid` marks those of its rows that belong to it.
    """
    nonempty_groups, ends = argsort(sizes == 0), jnp.cumsum(sizes)

    def group_body(i: Array, carry: Carry) -> Carry:
        group = nonempty_groups[i]
        start, end, weights = ends[group] - sizes[group], ends[group], weights_of(group)

        def block_body(block: Array, carry: Carry) -> Carry:
            begin = start + block * size
            first = jnp.minimum(begin, rows - size)
            row = first + jnp.arange(size)
            return compute(weights, first, (row >= begin) & (row < end), carry)

        return lax.fori_loop(0, (end - start + size - 1) // size, block_body, carry)

    return lax.fori_loop(0, jnp.sum(sizes > 0), group_body, carry)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return vary_alike(jnp.zeros(shape, like.dtype), like)[0]
