"""Grouped matmuls as XLA's CPU backend does them well: batched where groups are even, block by block where not.

M  rows, group after group     G  groups     D  inputs     F  outputs     B  rows of a block
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.layers.parameter import InPlace
from moe_jax.sharding.collectives import vary_alike

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 128


@dataclass(frozen=True)
class Walk:
    """One batched matmul of the first rows of every group, then a loop over blocks of one group each (as MegaBlocks
    has them, arXiv:2211.15841), as many as the sizes leave at run time. `jax.lax.ragged_dot` multiplies every row with
    every group's weights on a CPU.

    Where such a loop ends, XLA's GPU programs are said to ask the host each round (not measured): see `grouped_tiles`.
    """

    def product(self, rows: Float[Array, "M D"], weights: InPlace, sizes: Int32[Array, "G"]) -> Float[Array, "M F"]:
        count, groups = rows.shape[0], sizes.shape[0]
        starts, at_once = jnp.cumsum(sizes) - sizes, _rows_at_once(count, groups)
        shape = count, weights.stack.shape[-1]
        out = _first_rows(rows, weights.whole(), starts, at_once) if at_once else _zeros(shape, rows)
        left = jnp.maximum(sizes - at_once, 0)
        blocks = Blocks.of(starts + at_once, left, block_size(count, groups), count)

        def visit(i: Array, out: Array) -> Array:
            group, first, own = blocks.block(i)
            product = lax.dynamic_slice_in_dim(rows, first, blocks.size) @ weights.part(group)
            before = lax.dynamic_slice_in_dim(out, first, blocks.size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], product, before), first, 0)

        return lax.fori_loop(0, blocks.count, visit, out)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        count, groups = rows.shape[0], sizes.shape[0]
        blocks = Blocks.of(jnp.cumsum(sizes) - sizes, sizes, block_size(count, groups), count)

        def visit(i: Array, out: Array) -> Array:
            group, first, own = blocks.block(i)
            inputs, outputs = (
                jnp.where(own[:, None], lax.dynamic_slice_in_dim(x, first, blocks.size), 0) for x in (rows, grad)
            )
            return out.at[group].add(inputs.T @ outputs)

        return lax.fori_loop(0, blocks.count, visit, _zeros((groups, rows.shape[1], grad.shape[1]), rows))


def block_size(rows: int, groups: int) -> int:
    """A power of two near an even share of the rows, within the limits."""
    even_share = max(rows // groups, 1)
    return min(max(1 << (even_share - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK, rows)


def _rows_at_once(rows: int, groups: int) -> int:
    """How many rows of each group one batched matmul takes: half more than an even share, or none where shares are
    small, and reading the weights of groups without rows would cost more, or so large that blocks cost no more."""
    even_share = rows // groups
    return -(-even_share * 3 // 16) * 8 if 2 <= even_share < LARGEST_BLOCK else 0


def _first_rows(rows: Array, weights: Array, starts: Array, count: int) -> Float[Array, "M F"]:
    """The products of the first `count` rows of each group; the other rows hold anything."""
    at = starts[:, None] + jnp.arange(count)
    products = jnp.einsum("gbd,gdf->gbf", rows.at[at].get(mode="clip"), weights)
    row = jnp.arange(rows.shape[0])
    group = jnp.sum(starts[None, 1:] <= row[:, None], axis=1)
    return products.at[group, row - starts[group]].get(mode="clip")


@dataclass(frozen=True)
class Blocks:
    """Each group's rows in blocks of `size`, the last one partly filled."""

    starts: Int32[Array, "G"]
    """Each group's first row."""
    sizes: Int32[Array, "G"]
    block_ends: Int32[Array, "G"]
    """The block after each group's last."""
    size: int
    rows: int
    """Of all groups, and any beyond."""

    @classmethod
    def of(cls, starts: Array, sizes: Array, size: int, rows: int) -> Blocks:
        return cls(starts, sizes, jnp.cumsum((sizes + size - 1) // size), size, rows)

    @property
    def count(self) -> Int32[Array, ""]:
        return self.block_ends[-1]

    def span(self, i: Array) -> tuple[Int32[Array, ""], Int32[Array, ""], Int32[Array, ""]]:
        """Of block i its group, its first row, and the row after its last; no rows for a block beyond the last."""
        group = jnp.minimum(jnp.sum(self.block_ends <= i), len(self.sizes) - 1)
        blocks_left = self.block_ends[group] - i
        blocks_before = (self.sizes[group] + self.size - 1) // self.size - blocks_left
        start = self.starts[group] + blocks_before * self.size
        return group, start, jnp.minimum(start + self.size, self.starts[group] + self.sizes[group])

    def block(self, i: Array) -> tuple[Int32[Array, ""], Int32[Array, ""], Bool[Array, "B"]]:
        """Block i: its group, the first of the `size` rows to read (moved up to fit), and which of them are its own."""
        group, start, end = self.span(i)
        first = jnp.minimum(start, self.rows - self.size)
        row = first + jnp.arange(self.size)
        return group, first, (row >= start) & (row < end)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return vary_alike(jnp.zeros(shape, like.dtype), like)[0]
