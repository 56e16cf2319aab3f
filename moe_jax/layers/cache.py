"""Where attention finds keys and values; what recurrent layers remember is in `states.py`.

G  stacked layers     K  KV heads of a device     P  pages of a token shard     p  positions of a page
T  rows               S  lines of a grid          N  cached positions of a line     d, v  widths of keys and of values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.layers.step import Grid, Packing

Heads = Float[Array, "T K d"]


class Cached(NamedTuple):
    """What the rows of a grid may look at."""

    keys: Float[Array, "K S N d"]
    values: Float[Array, "K S N v"]
    """Zero, whatever the cache held, where nothing of the line was written."""
    positions: Int32[Array, "S N"]
    """Beyond every row's where nothing was written."""


View: TypeAlias = Callable[[Grid], Cached]
UNWRITTEN = 2**30


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

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing, window: int | None
    ) -> tuple[View, PagedCache]:
        table, (pages, size) = packing.table(window), self.keys.shape[2:4]
        within = packing.positions - table.firsts.at[packing.lines].get(mode="clip")
        page = table.pages.at[packing.lines, within // size].get(mode="fill", fill_value=pages)
        at = (layer, slice(None), page, within % size)
        cache = PagedCache(self.keys.at[at].set(keys, mode="drop"), self.values.at[at].set(values, mode="drop"))

        def view(grid: Grid) -> Cached:
            lines = packing.lines_of(grid)
            positions = table.firsts[lines, None] + jnp.arange(table.pages.shape[1] * size)
            last = packing.to_grid(packing.positions, grid)[:, 0] + packing.lengths[lines] - 1
            written = positions <= last[:, None]
            keys, values = (_gather(part, layer, table.pages[lines]) for part in (cache.keys, cache.values))
            values = jnp.where(written[..., None], values, 0)
            return Cached(keys, values, jnp.where(written, positions, UNWRITTEN))

        return view, cache


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
            return Cached(laid_out[0], jnp.where(written[..., None], laid_out[1], 0), positions)

        return view, self
