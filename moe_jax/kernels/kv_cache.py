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

from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.mesh import Device

Heads = Float[Array, "T K d"]


class KVBlock(NamedTuple):
    """Some of what the rows of a grid may look at."""

    keys: Float[Array, "K S n d"]
    values: Float[Array, "K S n v"]
    """Zero, whatever the cache held, where nothing of the line was written."""
    positions: Int32[Array, "S n"]
    """Beyond every row's where nothing was written."""


Carry = TypeVar("Carry")


class CachedKV(Protocol):
    """What the rows of a grid, or of some of its lines, may look at."""

    @property
    def value_shape(self) -> tuple[int, int]:
        """K and v."""
        ...

    def map_segments(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        """`attend(cached, *rows)`, for all lines together or for some after the other."""
        ...

    def fold(self, take: Callable[[KVBlock, Carry], Carry], start: Carry) -> Carry:
        """What comes of it when block after block is taken, in any number of blocks."""
        ...


Attend: TypeAlias = Callable[..., Float[Array, "S C H v"]]
KVView: TypeAlias = Callable[[QueryLayout], CachedKV]
UNWRITTEN = 2**30


class AttentionTile(NamedTuple):
    """What attention takes of a grid at a time."""

    segments: int
    pages: int


def attention_tile_on(device: Device) -> AttentionTile | None:
    """What suits the devices that a program is compiled for; `None` for everything at once.

    A CPU takes little, and only as far as there are lines, and as the longest of them has come. Others would wait for
    the host in a loop of which they do not know the end.
    """
    return AttentionTile(segments=32, pages=4) if device.platform == "cpu" else None


class KVCache(Protocol):
    """Takes the keys and values of a step's rows, and lets those of all earlier positions be seen too."""

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, batch: ForwardBatch, window: int | None
    ) -> tuple[KVView, Self]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedKVCache:
    """Keys and values in pages that requests share and give back (Kwon et al., arXiv:2309.06180), for G layers.

    A line's pages are gathered to lie as attention's batched matmuls read them, so that no matmul transposes its
    operand; the cache itself is updated in place.
    """

    keys: Float[Array, "G K P p d"]
    values: Float[Array, "G K P p v"]
    portion: AttentionTile | None = field(default=None, metadata={"static": True})

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, batch: ForwardBatch, window: int | None
    ) -> tuple[KVView, PagedKVCache]:
        table, (pages, size) = batch.table(window), self.keys.shape[2:4]
        within = batch.positions - table.firsts.at[batch.segments].get(mode="clip")
        page = table.pages.at[batch.segments, within // size].get(mode="fill", fill_value=pages)
        at = (layer, slice(None), page, within % size)
        written_keys, written_values = (
            part.at[at].set(new, mode="drop") for part, new in ((self.keys, keys), (self.values, values))
        )
        cache = PagedKVCache(written_keys, written_values, self.portion)

        def view(layout: QueryLayout) -> CachedKV:
            segments = batch.segments_of(layout)
            first, length = batch.to_padded(batch.positions, layout)[:, 0], batch.lengths[segments]
            ends = jnp.where(length > 0, first + length, 0)
            return PagedKV(cache, layer, table.pages[segments], table.firsts[segments], ends)

        return view, cache


class PagedKV(NamedTuple):
    """Pages of a cache, for each line of a grid."""

    cache: PagedKVCache
    layer: Int32[Array, ""]
    pages: Int32[Array, "S N"]
    firsts: Int32[Array, "S"]
    """The position at which the first of them begins."""
    ends: Int32[Array, "S"]
    """The position after the line's last; 0 for a line without rows."""

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.cache.values.shape[1], self.cache.values.shape[-1]

    def map_segments(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        portion, segments = self.cache.portion, self.ends.shape[0]
        if portion is None or segments <= portion.segments:
            return attend(self, *rows)
        of_segments = (self.pages, self.firsts, self.ends, *rows)

        def body(number: Int32[Array, ""], out: Array) -> Array:
            first = number * portion.segments
            pages, firsts, ends, *own = (
                lax.dynamic_slice_in_dim(part, first, portion.segments) for part in of_segments
            )
            attended = attend(self._replace(pages=pages, firsts=firsts, ends=ends), *own)
            return lax.dynamic_update_slice_in_dim(out, attended, first, 0)

        shape = jax.eval_shape(attend, self, *rows)
        out, *_ = vary_alike(jnp.zeros(shape.shape, shape.dtype), *of_segments, self.cache.keys, self.cache.values)
        used = jnp.max(jnp.where(self.ends > 0, jnp.arange(1, segments + 1), 0))
        return lax.fori_loop(0, (used + portion.segments - 1) // portion.segments, body, out)

    def fold(self, take: Callable[[KVBlock, Carry], Carry], start: Carry) -> Carry:
        if self.cache.portion is None:
            return take(self._block(self.pages, self.firsts), start)
        size = self.cache.portion.pages
        positions = size * self.cache.keys.shape[3]
        most = -(-self.pages.shape[1] // size)
        pages = jnp.pad(self.pages, ((0, 0), (0, most * size - self.pages.shape[1])))
        needed = jnp.max((self.ends - self.firsts + positions - 1) // positions)

        def body(number: Int32[Array, ""], sums: Carry) -> Carry:
            own = lax.dynamic_slice_in_dim(pages, number * size, size, axis=1)
            return take(self._block(own, self.firsts + number * positions), sums)

        leaves, tree = jax.tree.flatten(start)
        alike = vary_alike(*leaves, self.cache.keys, self.cache.values, self.ends)[: len(leaves)]
        return lax.fori_loop(0, jnp.minimum(needed, most), body, jax.tree.unflatten(tree, alike))

    def _block(self, pages: Int32[Array, "S _"], firsts: Int32[Array, "S"]) -> KVBlock:
        keys, values = (_gather(part, self.layer, pages) for part in (self.cache.keys, self.cache.values))
        positions = firsts[:, None] + jnp.arange(keys.shape[2])
        written = positions < self.ends[:, None]
        return KVBlock(keys, jnp.where(written[..., None], values, 0), jnp.where(written, positions, UNWRITTEN))


def _gather(part: Float[Array, "G K P p d"], layer: Int32[Array, ""], pages: Int32[Array, "S n"]) -> Array:
    """`[K, S, n*p, d]`."""
    found = jax.vmap(lambda of_head: of_head[layer, pages], in_axes=1)(part)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uncached:
    """Only this step's own keys and values: for training, where each sequence is whole in one step."""

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, batch: ForwardBatch, window: int | None
    ) -> tuple[KVView, Uncached]:
        del layer, window

        def view(layout: QueryLayout) -> CachedKV:
            written = jnp.arange(layout.chunk) < batch.lengths[batch.segments_of(layout), None]
            laid_out = [jnp.moveaxis(batch.to_padded(part, layout), 2, 0) for part in (keys, values)]
            positions = jnp.where(written, batch.to_padded(batch.positions, layout), UNWRITTEN)
            return StepKV(KVBlock(laid_out[0], jnp.where(written[..., None], laid_out[1], 0), positions))

        return view, self


class StepKV(NamedTuple):
    """A single block."""

    block: KVBlock

    @property
    def value_shape(self) -> tuple[int, int]:
        return self.block.values.shape[0], self.block.values.shape[-1]

    def map_segments(self, attend: Attend, *rows: Shaped[Array, "S ..."]) -> Float[Array, "S C H v"]:
        return attend(self, *rows)

    def fold(self, take: Callable[[KVBlock, Carry], Carry], start: Carry) -> Carry:
        return take(self.block, start)
