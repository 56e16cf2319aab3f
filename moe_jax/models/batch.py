"""Pack segments of sequences into the arrays of a forward batch, on the host.

T  rows of a token shard     L  segments of a token shard     N  pages of a segment, in one page table
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from moe_jax.kernels.forward_batch import ForwardBatch, PageTable, QueryLayout
from moe_jax.sharding import Placement, Role, Rows
from moe_jax.sharding.rows import on_host


class PageRange(NamedTuple):
    """Pages of consecutive positions of one sequence, for the layers that share one window."""

    first: int
    """Position at which the first page begins."""
    pages: array[int]
    """Page numbers of one token shard."""


class Segment(NamedTuple):
    """Consecutive tokens of one sequence in one step."""

    start: int
    """Position of the first token in its sequence."""
    tokens: Sequence[int]
    tables: Sequence[PageRange] = ()
    """Pages of all positions that these tokens attend to, their own included, for each window of the decoder."""


@dataclass(frozen=True)
class BatchShape:
    """Static sizes of a forward batch."""

    layouts: tuple[QueryLayout, ...]
    capacity: int
    """Rows of a token shard (T)."""
    tables: tuple[tuple[int | None, int], ...] = ()
    """Window and number of pages (N) of each page table."""


class Segments:
    """Segments of one layout of a token shard, stored as columns, which costs the host least.

    There may be fewer segments than the layout holds.
    """

    __slots__ = ("lengths", "starts", "tables", "tokens")

    def __init__(self, tables: int = 0) -> None:
        """Make an empty batch of segments with this number of page tables."""
        self.starts, self.lengths = array("i"), array("i")
        self.tokens = array("i")
        """Tokens of all segments, one segment after the other."""
        self.tables: list[list[PageRange]] = [[] for _ in range(tables)]

    @classmethod
    def of(cls, segments: Iterable[Segment], tables: int = 0) -> Segments:
        columns = cls(tables)
        for segment in segments:
            columns.add(segment)
        return columns

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, segment: Segment) -> None:
        self.starts.append(segment.start)
        self.lengths.append(len(segment.tokens))
        self.tokens.extend(segment.tokens)
        for ranges, page_range in zip(self.tables, segment.tables, strict=True):
            ranges.append(page_range)


def pack(
    shards: Sequence[Sequence[Segments]], shape: BatchShape, placement: Placement
) -> tuple[ForwardBatch, list[int]]:
    """Pack the segments of each layout of each token shard.

    Returns:
      The batch, as NumPy arrays, and the first row of each segment, counted over all token shards, in order.
    """
    assert len(shards) == placement.size(Role.TOKENS)
    parts = list(chain.from_iterable(shards))
    owners, places, per_shard = _places(shards, shape.layouts)
    lengths = _concatenate(part.lengths for part in parts)
    counts = np.bincount(owners, lengths, len(shards)).astype(np.int32)
    shard_starts = np.arange(len(shards)) * shape.capacity
    first_rows = np.cumsum(lengths) - lengths + (shard_starts - np.cumsum(counts) + counts)[owners]

    rows = _runs(first_rows, lengths)
    tokens, positions = np.zeros((2, len(shards) * shape.capacity), np.int32)
    segment_of_row = np.full(len(shards) * shape.capacity, per_shard, np.int32)
    tokens[rows] = _concatenate(part.tokens for part in parts)
    positions[rows] = _runs(_concatenate(part.starts for part in parts), lengths)
    segment_of_row[rows] = np.repeat(places % per_shard, lengths)
    starts, rows_of_segment = np.zeros((2, len(shards) * per_shard), np.int32)
    starts[places], rows_of_segment[places] = first_rows - shard_starts[owners], lengths
    tables = []
    for number, (window, length) in enumerate(shape.tables):
        pages = np.zeros((len(shards) * per_shard, length), np.int32)
        ranges = list(chain.from_iterable(part.tables[number] for part in parts))
        tables.append(_page_table(ranges, places, pages, window))
    batch = ForwardBatch(
        *map(on_host, (tokens, segment_of_row, positions, starts, rows_of_segment)),
        tables=tuple(tables),
        rows=Rows.of(counts.tolist(), placement, shape.capacity),
        layouts=shape.layouts,
    )
    return batch, first_rows.tolist()


def _places(shards: Sequence[Sequence[Segments]], layouts: Sequence[QueryLayout]) -> tuple[np.ndarray, np.ndarray, int]:
    """Return each segment's token shard, its place among all shards' places, and the number of places of a shard."""
    counts = np.array([[len(segments) for segments in shard] for shard in shards], np.int32)
    sizes = np.array([layout.segments for layout in layouts], np.int32)
    assert counts.shape == (len(shards), len(layouts))
    assert (counts <= sizes).all()
    firsts = np.arange(len(shards))[:, None] * sizes.sum() + np.cumsum(sizes) - sizes
    owners = np.repeat(np.arange(len(shards)), counts.sum(axis=1))
    return owners, _runs(firsts.reshape(-1), counts.reshape(-1)), int(sizes.sum())


def _page_table(ranges: Sequence[PageRange], places: np.ndarray, pages: np.ndarray, window: int | None) -> PageTable:
    """Write each segment's page range into its row of `pages`."""
    lengths = np.fromiter((len(each.pages) for each in ranges), np.int32, len(ranges))
    assert lengths.max(initial=0) <= pages.shape[1]
    pages.reshape(-1)[_runs(places * pages.shape[1], lengths)] = _concatenate(each.pages for each in ranges)
    firsts = np.zeros(len(pages), np.int32)
    firsts[places] = [each.first for each in ranges]
    return PageTable(on_host(pages), on_host(firsts), window)


def _concatenate(columns: Iterable[array[int]]) -> np.ndarray:
    return np.frombuffer(b"".join(columns), np.int32)


def _runs(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the ranges `[first, first + length)`."""
    ends = np.cumsum(lengths)
    return np.repeat(firsts - ends + lengths, lengths) + np.arange(lengths.sum())
