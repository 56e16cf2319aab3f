"""The input of one forward pass, packed from the tokens that each sequence takes part with.

T  rows of a token shard     L  lines of a token shard     N  pages of a line, in one table
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.layers import Grid, Packing, Table
from moe_jax.sharding import Placement, Role, Rows
from moe_jax.sharding.rows import on_host


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """All token shards' rows, shard after shard on the leading dimension. T is the capacity of `rows`."""

    tokens: Int32[Array, "shards*T"]
    packing: Packing
    rows: Rows


class PageRange(NamedTuple):
    """Where some consecutive positions of a sequence lie: pages of a token shard, for layers that look back equally
    far."""

    first: int
    """The position at which the first page begins."""
    pages: array[int]


class Segment(NamedTuple):
    """Consecutive tokens of one sequence in one step: a line."""

    start: int
    """The position of the first of them in its sequence."""
    tokens: Sequence[int]
    tables: Sequence[PageRange] = ()
    """One for each of the decoder's `windows`: pages of all positions that these tokens see, their own included."""


@dataclass(frozen=True)
class Shape:
    """The static sizes of a step."""

    grids: tuple[Grid, ...]
    capacity: int
    """T."""
    tables: tuple[tuple[int | None, int], ...] = ()
    """Of each table, the window and N."""


class Lines:
    """The segments of one grid of a token shard, by column, which costs the host least; missing ones take no part."""

    __slots__ = ("lengths", "starts", "tables", "tokens")

    def __init__(self, tables: int = 0) -> None:
        """Without any; each will have so many page ranges."""
        self.starts, self.lengths, self.tokens = array("i"), array("i"), array("i")
        """The tokens of all segments, one segment after the other, and how many each has."""
        self.tables: list[list[PageRange]] = [[] for _ in range(tables)]

    @classmethod
    def of(cls, segments: Sequence[Segment], tables: int = 0) -> Lines:
        lines = cls(tables)
        for segment in segments:
            lines.add(segment)
        return lines

    def __len__(self) -> int:
        return len(self.starts)

    def add(self, segment: Segment) -> None:
        self.starts.append(segment.start)
        self.lengths.append(len(segment.tokens))
        self.tokens.extend(segment.tokens)
        for ranges, own in zip(self.tables, segment.tables, strict=True):
            ranges.append(own)


def pack(shards: Sequence[Sequence[Lines]], shape: Shape, placement: Placement) -> tuple[Batch, list[int]]:
    """The arrays of a step, from the lines of each grid of each shard, and the row, over all shards, at which each
    segment begins, in order."""
    places, capacity = len(shards), shape.capacity
    assert places == placement.size(Role.TOKENS)
    parts = [grid for of_shard in shards for grid in of_shard]
    owners, into, lines = _places(shards, shape.grids)
    lengths = _joined(part.lengths for part in parts)
    counts = np.bincount(owners, lengths, places).astype(np.int32)
    first_rows = np.cumsum(lengths) - lengths + (np.arange(places) * capacity - np.cumsum(counts) + counts)[owners]

    rows = _runs(first_rows, lengths)
    tokens, positions = np.zeros((2, places * capacity), np.int32)
    line_of = np.full(places * capacity, lines, np.int32)
    tokens[rows] = _joined(part.tokens for part in parts)
    positions[rows] = _runs(_joined(part.starts for part in parts), lengths)
    line_of[rows] = np.repeat(into % lines, lengths)
    starts, rows_of = np.zeros((2, places * lines), np.int32)
    starts[into], rows_of[into] = first_rows - owners * capacity, lengths
    tables = []
    for number, (window, length) in enumerate(shape.tables):
        pages = np.zeros((places * lines, length), np.int32)
        tables.append(_table(list(chain.from_iterable(part.tables[number] for part in parts)), into, pages, window))
    packing = Packing(*map(on_host, (line_of, positions, starts, rows_of)), tables=tuple(tables), grids=shape.grids)
    return Batch(on_host(tokens), packing, Rows.of(counts.tolist(), placement, capacity)), first_rows.tolist()


def _places(shards: Sequence[Sequence[Lines]], grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each segment its shard, and its line over all shards; and how many lines a shard has."""
    taken = np.array([[len(segments) for segments in of_shard] for of_shard in shards], np.int32)
    sizes = np.array([grid.lines for grid in grids], np.int32)
    assert taken.shape == (len(shards), len(grids))
    assert (taken <= sizes).all()
    firsts = np.arange(len(shards))[:, None] * sizes.sum() + np.cumsum(sizes) - sizes
    owners = np.repeat(np.arange(len(shards)), taken.sum(axis=1))
    return owners, _runs(firsts.reshape(-1), taken.reshape(-1)), int(sizes.sum())


def _table(ranges: Sequence[PageRange], into: np.ndarray, pages: np.ndarray, window: int | None) -> Table:
    """The ranges written into their lines of `pages`."""
    held = np.fromiter((len(each.pages) for each in ranges), np.int32, len(ranges))
    assert held.max(initial=0) <= pages.shape[1]
    pages.reshape(-1)[_runs(into * pages.shape[1], held)] = _joined(each.pages for each in ranges)
    firsts = np.zeros(len(pages), np.int32)
    firsts[into] = [each.first for each in ranges]
    return Table(on_host(pages), on_host(firsts), window)


def _joined(columns: Iterable[array[int]]) -> np.ndarray:
    return np.frombuffer(b"".join(columns), np.int32)


def _runs(firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each first on, as many as its length, one run after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(firsts - ends + lengths, lengths) + np.arange(lengths.sum())
