"""Input of one forward pass, and the map from its rows to tokens of sequences.

    T  rows of a token shard     L  segments of a token shard
    C  rows of the longest segment of a layout     N  pages of a segment, in one page table

A segment is a run of neighbouring tokens of one sequence: the next token of a sequence that decodes, or a piece of a
prompt. One page table row serves it. A long piece of a prompt may be several segments, which follow each other in
order; in each layer all rows are written to the cache before any row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped

from moe_jax.sharding import Rows


class QueryLayout(NamedTuple):
    """Neighbouring segments that attention computes together, padded to `[segments, chunk]`."""

    segments: int
    chunk: int
    """Rows of each segment, padding included (C)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageTable:
    """Pages of each segment's sequence, for the layers that share one window."""

    pages: Int32[Array, "L N"]
    """Page numbers of this token shard, for consecutive positions."""
    firsts: Int32[Array, "L"]
    """Position at which each segment's first page begins."""
    window: int | None = field(metadata={"static": True})
    """Window of these layers, as in `AttentionConfig`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardBatch:
    """Tokens of one forward pass, segment after segment.

    On the host, every array holds all token shards, one after the other on the leading dimension; inside `shard_map`,
    this device's token shard. T is the capacity of `rows`.
    """

    tokens: Int32[Array, "T"]
    """Token id of each row."""
    segments: Int32[Array, "T"]
    """Segment of each row; L for pad rows, so that nothing is written for them."""
    positions: Int32[Array, "T"]
    """Position of each row in its sequence."""
    starts: Int32[Array, "L"]
    """First row of each segment; undefined for a segment without rows in this step."""
    lengths: Int32[Array, "L"]
    """Number of rows of each segment."""
    tables: tuple[PageTable, ...]
    """One page table per window of the model; empty where nothing is cached."""
    rows: Rows
    """Number of real rows of every token shard."""
    layouts: tuple[QueryLayout, ...] = field(metadata={"static": True})
    """Layouts that together hold all segments, in order."""

    @property
    def capacity(self) -> int:
        """Rows of a token shard, padding included (T)."""
        return self.rows.capacity

    def labelled(self, split: Any, same: Any) -> ForwardBatch:
        """Replace each array that is split over the token shards by `split`, and the others by `same`: for specs."""
        labels = jax.tree.map(lambda _: split, self)
        return replace(labels, rows=jax.tree.map(lambda _: same, self.rows))

    def table(self, window: int | None) -> PageTable:
        return next(table for table in self.tables if table.window == window)

    def segments_of(self, layout: QueryLayout) -> slice:
        first = self._first_segments[self.layouts.index(layout)]
        return slice(first, first + layout.segments)

    def to_padded(self, rows: Shaped[Array, "T ..."], layout: QueryLayout) -> Shaped[Array, "segments C ..."]:
        """Lay rows out by segment. Places beyond a segment's length hold rows of other segments: mask them."""
        return rows.at[self.starts[self.segments_of(layout), None] + jnp.arange(layout.chunk)].get(mode="clip")

    def to_rows(self, parts: Sequence[Shaped[Array, "segments C ..."]]) -> Shaped[Array, "T ..."]:
        """Invert `to_padded` over all layouts, for real rows; pad rows repeat some other row."""
        flat = jnp.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])
        segments = jnp.minimum(self.segments, self.starts.shape[0] - 1)
        chunks = np.repeat([layout.chunk for layout in self.layouts], [layout.segments for layout in self.layouts])
        firsts, lasts = jnp.asarray(np.cumsum(chunks) - chunks), jnp.asarray(chunks - 1)
        within = jnp.arange(self.segments.shape[0]) - self.starts[segments]
        return flat[firsts[segments] + jnp.clip(within, 0, lasts[segments])]

    @property
    def _first_segments(self) -> list[int]:
        return list(accumulate((layout.segments for layout in self.layouts), initial=0))
