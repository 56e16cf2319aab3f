"""The input of one forward pass, packed from the tokens that each sequence takes part with.

T  rows of a token shard     L  lines of a token shard     N  pages of a line, in one table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class PageRange:
    """Where some consecutive positions of a sequence lie: pages of a token shard, for layers that look back equally
    far."""

    first: int
    """The position at which the first page begins."""
    pages: Sequence[int]


@dataclass(frozen=True)
class Segment:
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


Lines = Sequence[Sequence[Segment]]
"""Of one token shard, the lines of each grid; those that are missing take no part."""


def pack(shards: Sequence[Lines], shape: Shape, placement: Placement) -> tuple[Batch, list[int]]:
    """The arrays of a step, and the row, over all shards, at which each segment begins, in order."""
    places, capacity, lines = len(shards), shape.capacity, sum(grid.lines for grid in shape.grids)
    assert places == placement.size(Role.TOKENS)
    tokens, positions = np.zeros((2, places, capacity), np.int32)
    line_of = np.full((places, capacity), lines, np.int32)
    starts, lengths = np.zeros((2, places, lines), np.int32)
    pages = [np.zeros((places, lines, length), np.int32) for _, length in shape.tables]
    firsts = np.zeros((len(shape.tables), places, lines), np.int32)
    counts, first_rows = [0] * places, []
    for shard, of_shard in enumerate(shards):
        line, row = 0, 0
        for grid, segments in zip(shape.grids, of_shard, strict=True):
            assert len(segments) <= grid.lines
            for place, segment in enumerate(segments, line):
                length = len(segment.tokens)
                rows = slice(row, row + length)
                tokens[shard, rows], line_of[shard, rows] = segment.tokens, place
                positions[shard, rows] = range(segment.start, segment.start + length)
                starts[shard, place], lengths[shard, place] = row, length
                for number, table in enumerate(segment.tables):
                    firsts[number, shard, place] = table.first
                    pages[number][shard, place, : len(table.pages)] = table.pages
                first_rows.append(shard * capacity + row)
                row += length
            line += grid.lines
        counts[shard] = row
    tables = tuple(
        Table(on_host(of_lines.reshape(-1, of_lines.shape[-1])), on_host(first.reshape(-1)), window)
        for of_lines, first, (window, _) in zip(pages, firsts, shape.tables, strict=True)
    )
    flat = [on_host(array.reshape(-1)) for array in (line_of, positions, starts, lengths)]
    packing = Packing(*flat, tables=tables, grids=shape.grids)
    return Batch(on_host(tokens.reshape(-1)), packing, Rows.of(counts, placement, capacity)), first_rows
