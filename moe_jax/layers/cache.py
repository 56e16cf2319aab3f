"""Where attention finds keys and values; what recurrent layers remember is in `states.py`.

G  stacked layers     K  KV heads of a device     P  pages of a token shard     p  positions of a page
T  rows     S  lines of a grid     N  pages of a line     n  positions of a block     d, v  widths of keys and values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from moe_jax.layers.step import Grid, Packing
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.mesh import Device

Heads = Float[Array, "T K d"]


class Block(NamedTuple):
    """Some of what the rows of a grid may look at."""

    keys: Float[Array, "K S n d"]
    values: Float[Array, "K S n v"]
    """Zero, whatever the cache held, where nothing of the line was written."""
    positions: Int32[Array, "S n"]
    """Beyond every row's where nothing was written."""


Sums = TypeVar("Sums")


class Cached(Protocol):
    """What the rows of a grid, or of some of its lines, may look at."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """K and v."""
        ...

    def by_lines(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        """`attend(cached, *rows)`, for all lines together or for some after the other."""
        ...

    def fold(self, take: Callable[[Block, Sums], Sums], start: Sums) -> Sums:
        """What comes of it when block after block is taken, in any number of blocks."""
        ...


Attend: TypeAlias = Callable[..., Float[Array, "S C H v"]]
View: TypeAlias = Callable[[Grid], Cached]
UNWRITTEN = 2**30


class Portion(NamedTuple):
    """What attention takes of a grid at a time."""

    lines: int
    pages: int


def portion_on(device: Device) -> Portion | None:
    """What suits the devices that a program is compiled for; `None` for everything at once.

    A CPU takes little, and only as far as there are lines, and as the longest of them has come. Others would wait for
    the host in a loop of which they do not know the end.
    """
    return Portion(lines=32, pages=4) if device.platform == "cpu" else None


class Cache(Protocol):
    """Takes the keys and values of a step's rows, and lets those of all earlier positions be seen too."""

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing, window: int | None
    ) -> tuple[View, Self]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """Keys and values in pages that requests share and give back (Kwon et al., arXiv:2309.06180), for G layers.

    A line's pages are gathered to lie as attention's batched matmuls read them, so that no matmul transposes its
    operand; the cache itself is updated in place.
    """

    keys: Float[Array, "G K P p d"]
    values: Float[Array, "G K P p v"]
    portion: Portion | None = field(default=None, metadata={"static": True})

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing, window: int | None
    ) -> tuple[View, PagedCache]:
        table, (pages, size) = packing.table(window), self.keys.shape[2:4]
        within = packing.positions - table.firsts.at[packing.lines].get(mode="clip")
        page = table.pages.at[packing.lines, within // size].get(mode="fill", fill_value=pages)
        at = (layer, slice(None), page, within % size)
        written_keys, written_values = (
            part.at[at].set(new, mode="drop") for part, new in ((self.keys, keys), (self.values, values))
        )
        cache = PagedCache(written_keys, written_values, self.portion)

        def view(grid: Grid) -> Cached:
            lines = packing.lines_of(grid)
            first, length = packing.to_grid(packing.positions, grid)[:, 0], packing.lengths[lines]
            ends = jnp.where(length > 0, first + length, 0)
            return CachedPages(cache, layer, table.pages[lines], table.firsts[lines], ends)

        return view, cache


class CachedPages(NamedTuple):
    """Pages of a cache, for each line of a grid."""

    cache: PagedCache
    layer: Int32[Array, ""]
    pages: Int32[Array, "S N"]
    firsts: Int32[Array, "S"]
    """The position at which the first of them begins."""
    ends: Int32[Array, "S"]
    """The position after the line's last; 0 for a line without rows."""

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.cache.values.shape[1], self.cache.values.shape[-1]

    def by_lines(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        portion, lines = self.cache.portion, self.ends.shape[0]
        if portion is None or lines <= portion.lines:
            return attend(self, *rows)
        of_lines = (self.pages, self.firsts, self.ends, *rows)

        def body(number: Int32[Array, ""], out: Array) -> Array:
            first = number * portion.lines
            pages, firsts, ends, *own = (lax.dynamic_slice_in_dim(part, first, portion.lines) for part in of_lines)
            attended = attend(self._replace(pages=pages, firsts=firsts, ends=ends), *own)
            return lax.dynamic_update_slice_in_dim(out, attended, first, 0)

        shape = jax.eval_shape(attend, self, *rows)
        out, *_ = vary_alike(jnp.zeros(shape.shape, shape.dtype), *of_lines, self.cache.keys, self.cache.values)
        used = jnp.max(jnp.where(self.ends > 0, jnp.arange(1, lines + 1), 0))
        return lax.fori_loop(0, (used + portion.lines - 1) // portion.lines, body, out)

    def fold(self, take: Callable[[Block, Sums], Sums], start: Sums) -> Sums:
        if self.cache.portion is None:
            return take(self._block(self.pages, self.firsts), start)
        size = self.cache.portion.pages
        positions = size * self.cache.keys.shape[3]
        most = -(-self.pages.shape[1] // size)
        pages = jnp.pad(self.pages, ((0, 0), (0, most * size - self.pages.shape[1])))
        needed = jnp.max((self.ends - self.firsts + positions - 1) // positions)

        def body(number: Int32[Array, ""], sums: Sums) -> Sums:
            own = lax.dynamic_slice_in_dim(pages, number * size, size, axis=1)
            return take(self._block(own, self.firsts + number * positions), sums)

        leaves, tree = jax.tree.flatten(start)
        alike = vary_alike(*leaves, self.cache.keys, self.cache.values, self.ends)[: len(leaves)]
        return lax.fori_loop(0, jnp.minimum(needed, most), body, jax.tree.unflatten(tree, alike))

    def _block(self, pages: Int32[Array, "S _"], firsts: Int32[Array, "S"]) -> Block:
        keys, values = (_gather(part, self.layer, pages) for part in (self.cache.keys, self.cache.values))
        positions = firsts[:, None] + jnp.arange(keys.shape[2])
        written = positions < self.ends[:, None]
        return Block(keys, jnp.where(written[..., None], values, 0), jnp.where(written, positions, UNWRITTEN))


def _gather(part: Float[Array, "G K P p d"], layer: Int32[Array, ""], pages: Int32[Array, "S n"]) -> Array:
    """`[K, S, n*p, d]`."""
    found = jax.vmap(lambda of_head: of_head[layer, pages], in_axes=1)(part)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uncached:
    """Only this step's own keys and values: for training, where each sequence is whole in one step."""

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing, window: int | None
    ) -> tuple[View, Uncached]:
        del layer, window

        def view(grid: Grid) -> Cached:
            written = jnp.arange(grid.chunk) < packing.lengths[packing.lines_of(grid), None]
            laid_out = [jnp.moveaxis(packing.to_grid(part, grid), 2, 0) for part in (keys, values)]
            positions = jnp.where(written, packing.to_grid(packing.positions, grid), UNWRITTEN)
            return Whole(Block(laid_out[0], jnp.where(written[..., None], laid_out[1], 0), positions))

        return view, self


class Whole(NamedTuple):
    """A single block."""

    block: Block

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.block.values.shape[0], self.block.values.shape[-1]

    def by_lines(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        return attend(self, *rows)

    def fold(self, take: Callable[[Block, Sums], Sums], start: Sums) -> Sums:
        return take(self.block, start)
