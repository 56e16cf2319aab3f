"""Cached keys and values of attention layers; `recurrent_states` has the memory of recurrent layers.

G  stacked layers     K  KV heads of a device     P  pages of a token shard     p  positions of a page
T  rows     S  segments of a query layout     C  rows of a segment     N  pages of a segment
n  positions of a block     d, v  widths of keys and values
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.mesh import Device

KVHeads = Float[Array, "T K d"]
Carry = TypeVar("Carry")


class KVBlock(NamedTuple):
    """Keys and values of some positions, for each segment."""

    keys: Float[Array, "K S n d"]
    values: Float[Array, "K S n v"]
    """Values; zero, whatever the cache holds, where the segment's sequence has written nothing."""
    positions: Int32[Array, "S n"]
    """Positions; `UNWRITTEN` where the segment's sequence has written nothing."""


class CachedKV(Protocol):
    """Keys and values that segments of a query layout attend to."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """KV heads and width of the values (K and v)."""
        ...

    def map_segments(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        """Compute `attend(cached, *rows)` for all segments at once, or for some segments after the others."""
        ...

    def fold(self, update: Callable[[KVBlock, Carry], Carry], start: Carry) -> Carry:
        """Update `start` by each block of positions, in any number of blocks."""
        ...


Attend: TypeAlias = Callable[..., Float[Array, "S C H v"]]
"""From cached keys and values, and arrays by segment, to the outputs of attention."""
KVView: TypeAlias = Callable[[QueryLayout], CachedKV]
"""From a query layout to the keys and values that its segments attend to."""
UNWRITTEN = 2**30
"""Position of unwritten keys and values: beyond every row's."""


class AttentionTile(NamedTuple):
    """Segments and pages that attention computes at a time."""

    segments: int
    pages: int


def attention_tile_on(device: Device) -> AttentionTile | None:
    """Choose the tile for programs compiled for a device; `None` for everything at once.

    A CPU loops over small tiles, up to the last segment with rows and its longest sequence. Other devices would wait
    for the host in a loop whose end is known at run time only.
    """
    return AttentionTile(segments=32, pages=4) if device.platform == "cpu" else None


class KVCache(Protocol):
    """Store the keys and values of each step's rows, and give attention all earlier ones too."""

    def write(
        self, layer: Int32[Array, ""], keys: KVHeads, values: KVHeads, batch: ForwardBatch, window: int | None
    ) -> tuple[KVView, Self]:
        """Write the rows' keys and values, then return what the rows attend to, and the new cache."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of G layers in pages that requests share and give back (Kwon et al., arXiv:2309.06180).

    The pages of a segment are gathered in the layout of attention's batched matmuls, so that no matmul transposes its
    operand. The cache is updated in place.
    """

    keys: Float[Array, "G K P p d"]
    values: Float[Array, "G K P p v"]
    tile: AttentionTile | None = field(default=None, metadata={"static": True})

    def write(
        self, layer: Int32[Array, ""], keys: KVHeads, values: KVHeads, batch: ForwardBatch, window: int | None
    ) -> tuple[KVView, PagedKVCache]:
        table, (pages, size) = batch.table(window), self.keys.shape[2:4]
        within = batch.positions - table.firsts.at[batch.segments].get(mode="clip")
        page = table.pages.at[batch.segments, within // size].get(mode="fill", fill_value=pages)
        at = (layer, slice(None), page, within % size)
        new_keys, new_values = (
            cached.at[at].set(new, mode="drop") for cached, new in ((self.keys, keys), (self.values, values))
        )
        cache = PagedKVCache(new_keys, new_values, self.tile)

        def view(layout: QueryLayout) -> CachedKV:
            segments = batch.segments_of(layout)
            first, length = batch.to_padded(batch.positions, layout)[:, 0], batch.lengths[segments]
            ends = jnp.where(length > 0, first + length, 0)
            return PagedKV(cache, layer, table.pages[segments], table.firsts[segments], ends)

        return view, cache


class PagedKV(NamedTuple):
    """Pages of a cache, for each segment of a query layout."""

    cache: PagedKVCache
    layer: Int32[Array, ""]
    pages: Int32[Array, "S N"]
    firsts: Int32[Array, "S"]
    """Position at which each segment's first page begins."""
    ends: Int32[Array, "S"]
    """Position after each segment's last row; 0 for a segment without rows."""

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.cache.values.shape[1], self.cache.values.shape[-1]

    def map_segments(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        tile, segments = self.cache.tile, self.ends.shape[0]
        if tile is None or segments <= tile.segments:
            return attend(self, *rows)
        by_segment = (self.pages, self.firsts, self.ends, *rows)

        def body(number: Int32[Array, ""], out: Array) -> Array:
            first = number * tile.segments
            pages, firsts, ends, *tile_rows = (
                lax.dynamic_slice_in_dim(part, first, tile.segments) for part in by_segment
            )
            attended = attend(self._replace(pages=pages, firsts=firsts, ends=ends), *tile_rows)
            return lax.dynamic_update_slice_in_dim(out, attended, first, 0)

        shape = jax.eval_shape(attend, self, *rows)
        out, *_ = vary_alike(jnp.zeros(shape.shape, shape.dtype), *by_segment, self.cache.keys, self.cache.values)
        used = jnp.max(jnp.where(self.ends > 0, jnp.arange(1, segments + 1), 0))
        return lax.fori_loop(0, (used + tile.segments - 1) // tile.segments, body, out)

    def fold(self, update: Callable[[KVBlock, Carry], Carry], start: Carry) -> Carry:
        if self.cache.tile is None:
            return update(self._block(self.pages, self.firsts), start)
        size = self.cache.tile.pages
        positions = size * self.cache.keys.shape[3]
        max_blocks = -(-self.pages.shape[1] // size)
        pages = jnp.pad(self.pages, ((0, 0), (0, max_blocks * size - self.pages.shape[1])))
        needed = jnp.max((self.ends - self.firsts + positions - 1) // positions)

        def body(number: Int32[Array, ""], carry: Carry) -> Carry:
            block_pages = lax.dynamic_slice_in_dim(pages, number * size, size, axis=1)
            return update(self._block(block_pages, self.firsts + number * positions), carry)

        leaves, tree = jax.tree.flatten(start)
        alike = vary_alike(*leaves, self.cache.keys, self.cache.values, self.ends)[: len(leaves)]
        return lax.fori_loop(0, jnp.minimum(needed, max_blocks), body, jax.tree.unflatten(tree, alike))

    def _block(self, pages: Int32[Array, "S _"], firsts: Int32[Array, "S"]) -> KVBlock:
        keys, values = (_gather(part, self.layer, pages) for part in (self.cache.keys, self.cache.values))
        positions = firsts[:, None] + jnp.arange(keys.shape[2])
        written = positions < self.ends[:, None]
        return KVBlock(keys, jnp.where(written[..., None], values, 0), jnp.where(written, positions, UNWRITTEN))


def _gather(part: Float[Array, "G K P p d"], layer: Int32[Array, ""], pages: Int32[Array, "S n"]) -> Array:
    """Read pages of one layer: `[K, S, n*p, d]`."""
    gathered = jax.vmap(lambda head: head[layer, pages], in_axes=1)(part)
    return gathered.reshape(*gathered.shape[:2], -1, gathered.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uncached:
    """No cache: each step attends to its own keys and values, for training, where a step holds whole sequences."""

    def write(
        self, layer: Int32[Array, ""], keys: KVHeads, values: KVHeads, batch: ForwardBatch, window: int | None
    ) -> tuple[KVView, Uncached]:
        del layer, window

        def view(layout: QueryLayout) -> CachedKV:
            written = jnp.arange(layout.chunk) < batch.lengths[batch.segments_of(layout), None]
            padded_keys, padded_values = (jnp.moveaxis(batch.to_padded(part, layout), 2, 0) for part in (keys, values))
            positions = jnp.where(written, batch.to_padded(batch.positions, layout), UNWRITTEN)
            return StepKV(KVBlock(padded_keys, jnp.where(written[..., None], padded_values, 0), positions))

        return view, self


class StepKV(NamedTuple):
    """Keys and values of a step, as a single block."""

    block: KVBlock

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.block.values.shape[0], self.block.values.shape[-1]

    def map_segments(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        return attend(self, *rows)

    def fold(self, update: Callable[[KVBlock, Carry], Carry], start: Carry) -> Carry:
        return update(self.block, start)
