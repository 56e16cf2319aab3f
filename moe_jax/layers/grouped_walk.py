"""Grouped matmuls as XLA's CPU backend does them well: batched where groups are even, block by block where not.

M  rows, group after group     G  groups     D  inputs     F  outputs     B  rows of a block
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.layers.parameter import InPlace
from moe_jax.sharding.collectives import argsort, vary_alike

SMALLEST_BLOCK, LARGEST_BLOCK = 8, 64

Part = TypeVar("Part")
Carry = TypeVar("Carry")


@dataclass(frozen=True)
class Walk:
    """One batched matmul of the first rows of every group, then a loop over blocks of one group each (as MegaBlocks
    has them, arXiv:2211.15841), as many as the sizes leave at run time. `jax.lax.ragged_dot` multiplies every row with
    every group's weights on a CPU.

    Where such a loop ends, XLA's GPU programs are said to ask the host each round (not measured): see `grouped_tiles`.
    """

    def product(self, rows: Float[Array, "M D"], weights: InPlace, sizes: Int32[Array, "G"]) -> Float[Array, "M F"]:
        count, groups = rows.shape[0], sizes.shape[0]
        starts, at_once = jnp.cumsum(sizes) - sizes, rows_at_once(count, groups)
        shape = count, weights.stack.shape[-1]
        out = _first_rows(rows, weights.whole(), starts, at_once) if at_once else _zeros(shape, rows)
        size = block_size(count, groups)

        def visit(weight: Array, first: Array, own: Array, out: Array) -> Array:
            product = lax.dynamic_slice_in_dim(rows, first, size) @ weight
            before = lax.dynamic_slice_in_dim(out, first, size)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(own[:, None], product, before), first, 0)

        left = jnp.maximum(sizes - at_once, 0)
        return visit_blocks(starts + at_once, left, size, count, weights.part, visit, out)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        count, groups = rows.shape[0], sizes.shape[0]
        size = block_size(count, groups)

        def visit(group: Array, first: Array, own: Array, out: Array) -> Array:
            inputs, outputs = (
                jnp.where(own[:, None], lax.dynamic_slice_in_dim(x, first, size), 0) for x in (rows, grad)
            )
            return out.at[group].add(inputs.T @ outputs)

        zeros = _zeros((groups, rows.shape[1], grad.shape[1]), rows)
        return visit_blocks(jnp.cumsum(sizes) - sizes, sizes, size, count, lambda group: group, visit, zeros)


def block_size(rows: int, groups: int) -> int:
    """A power of two near an even share of the rows, within the limits."""
    even_share = max(rows // groups, 1)
    return min(max(1 << (even_share - 1).bit_length(), SMALLEST_BLOCK), LARGEST_BLOCK, rows)


def rows_at_once(rows: int, groups: int) -> int:
    """How many rows of each group one batched matmul takes: half more than an even share, or none where shares are
    small, and reading the weights of groups without rows would cost more, or so large that blocks cost no more."""
    even_share = rows // groups
    return -(-even_share * 3 // 16) * 8 if 2 <= even_share < LARGEST_BLOCK else 0


def visit_blocks(
    starts: Int32[Array, "G"],
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
    with_rows, lasts = argsort(sizes == 0), starts + sizes

    def of_group(i: Array, carry: Carry) -> Carry:
        group = with_rows[i]
        start, last, own_part = starts[group], lasts[group], part(group)

        def block(b: Array, carry: Carry) -> Carry:
            begin = start + b * size
            first = jnp.minimum(begin, rows - size)
            row = first + jnp.arange(size)
            return visit(own_part, first, (row >= begin) & (row < last), carry)

        return lax.fori_loop(0, (last - start + size - 1) // size, block, carry)

    return lax.fori_loop(0, jnp.sum(sizes > 0), of_group, carry)


def _first_rows(rows: Array, weights: Array, starts: Array, count: int) -> Float[Array, "M F"]:
    """The products of the first `count` rows of each group; the other rows hold anything."""
    at = starts[:, None] + jnp.arange(count)
    products = jnp.einsum("gbd,gdf->gbf", rows.at[at].get(mode="clip"), weights)
    row = jnp.arange(rows.shape[0])
    group = jnp.sum(starts[None, 1:] <= row[:, None], axis=1)
    return products.at[group, row - starts[group]].get(mode="clip")


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return vary_alike(jnp.zeros(shape, like.dtype), like)[0]
