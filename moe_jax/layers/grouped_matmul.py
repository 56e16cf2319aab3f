"""A matmul per group of rows, with work that grows with the rows and not with the number of groups.

    M  rows, group after group     G  groups     D  inputs     F  outputs     B  rows of a block

`jax.lax.ragged_dot` multiplies every row with every group's weights on CPU and GPU, then masks. This walks over
blocks of at most B rows of one group (as MegaBlocks does, arXiv:2211.15841), as many as the group sizes need at run
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.sharding.collectives import vary_alike

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


def grouped_matmul(
    rows: Float[Array, "M D"], weights: Float[Array, "G D F"], group_sizes: Int32[Array, "G"]
) -> Float[Array, "M F"]:
    """`rows @ weights[g]` for the rows of each group g, which follow each other in order.

    Rows beyond the sum of `group_sizes` may hold anything; they cost nothing and their output is zero. Differentiable
    in rows and weights.
    """
    return _grouped_matmul(*vary_alike(rows, weights, group_sizes))


@jax.custom_vjp
def _grouped_matmul(rows: Array, weights: Array, group_sizes: Array) -> Array:
    blocks = _Blocks.of(rows.shape[0], group_sizes)

    def visit(i: Array, out: Array) -> Array:
        group, first, real = blocks.block(i)
        product = lax.dynamic_slice_in_dim(rows, first, blocks.size) @ weights[group]
        before = lax.dynamic_slice_in_dim(out, first, blocks.size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(real[:, None], product, before), first, 0)

    return lax.fori_loop(0, blocks.count, visit, _zeros((rows.shape[0], weights.shape[2]), rows))


def _forward(rows: Array, weights: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _grouped_matmul(rows, weights, group_sizes), (rows, weights, group_sizes)


def _backward(saved: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array, None]:
    rows, weights, group_sizes = saved
    grad_rows = _grouped_matmul(grad, weights.swapaxes(1, 2), group_sizes)
    return grad_rows, _grad_weights(rows, grad, group_sizes), None


_grouped_matmul.defvjp(_forward, _backward)


def _grad_weights(rows: Array, grad: Array, group_sizes: Array) -> Array:
    """`rows[g].T @ grad[g]` for each group g: `[G, D, F]`."""
    blocks = _Blocks.of(rows.shape[0], group_sizes)

    def visit(i: Array, out: Array) -> Array:
        group, first, real = blocks.block(i)
        inputs, outputs = (
            jnp.where(real[:, None], lax.dynamic_slice_in_dim(x, first, blocks.size), 0) for x in (rows, grad)
        )
        return out.at[group].add(inputs.T @ outputs)

    shape = (group_sizes.shape[0], rows.shape[1], grad.shape[1])
    return lax.fori_loop(0, blocks.count, visit, _zeros(shape, rows))


@dataclass(frozen=True)
class _Blocks:
    """The walk: each group's rows in blocks of `size`, the last one partly filled."""

    ends: Int32[Array, "G"]
    """The row after each group's last."""
    block_ends: Int32[Array, "G"]
    """The block after each group's last."""
    group_sizes: Int32[Array, "G"]
    rows: int
    size: int

    @classmethod
    def of(cls, rows: int, group_sizes: Array) -> _Blocks:
        even_share = max(rows // group_sizes.shape[0], 1)
        size = min(max(1 << (even_share - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK, rows)
        blocks = (group_sizes + size - 1) // size
        return cls(jnp.cumsum(group_sizes), jnp.cumsum(blocks), group_sizes, rows, size)

    @property
    def count(self) -> Int32[Array, ""]:
        return self.block_ends[-1]

    def block(self, i: Array) -> tuple[Int32[Array, ""], Int32[Array, ""], Bool[Array, "B"]]:
        """Block i: its group, the first of the `size` rows to read (moved up to fit), and which of them are its own."""
        group = jnp.sum(self.block_ends <= i)
        blocks_left = self.block_ends[group] - i
        blocks_before = (self.group_sizes[group] + self.size - 1) // self.size - blocks_left
        start = self.ends[group] - self.group_sizes[group] + blocks_before * self.size
        first = jnp.minimum(start, self.rows - self.size)
        row = first + jnp.arange(self.size)
        return group, first, (row >= start) & (row < self.ends[group])


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return vary_alike(jnp.zeros(shape, like.dtype), like)[0]
