"""What one forward pass knows besides its rows' values: which row is which token of which sequence.

    T  rows of a token shard     L  lines: the parts of sequences that take part in this step, on a token shard
    C  the most rows of a line   N  pages of a line, in one table

A line is what one table of pages serves: the last token of a sequence that decodes, or some neighbouring tokens of a
prompt. A long piece of a prompt may be several lines: in each layer all rows are written before any is read. Lines of
one sequence, and so their rows, follow each other in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped

from moe_jax.layers.rope import CosSin, Rotary
from moe_jax.sharding import Combine, Residual, Route, Rows


class Grid(NamedTuple):
    """Neighbouring lines that attention takes together, laid out as `[lines, chunk]`."""

    lines: int
    chunk: int
    """C, of these."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Table:
    """In which pages of the cache the positions of each line lie, for layers that look back equally far."""

    pages: Int32[Array, "L N"]
    """Pages of this token shard, for consecutive positions."""
    firsts: Int32[Array, "L"]
    """The position at which the first of them begins."""
    window: int | None = field(metadata={"static": True})
    """As in `AttentionConfig`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """The rows of a shard, line after line.

    Every array is per token shard; the shards' arrays follow each other on the leading dimension.
    """

    lines: Int32[Array, "T"]
    """The line of each row; pad rows say L, which none is, so that nothing is written for them."""
    positions: Int32[Array, "T"]
    """The position of each row in its sequence."""
    starts: Int32[Array, "L"]
    """The first row of each line; anything for a line without rows in this step."""
    lengths: Int32[Array, "L"]
    """How many rows each line has."""
    tables: tuple[Table, ...]
    """One for each distance that layers look back; none where nothing is cached."""
    grids: tuple[Grid, ...] = field(metadata={"static": True})
    """The lines, in order."""

    def table(self, window: int | None) -> Table:
        return next(table for table in self.tables if table.window == window)

    def lines_of(self, grid: Grid) -> slice:
        first = self._first_lines[self.grids.index(grid)]
        return slice(first, first + grid.lines)

    def to_grid(self, rows: Shaped[Array, "T ..."], grid: Grid) -> Shaped[Array, "lines C ..."]:
        """Rows laid out by line; places beyond a line's length hold rows of others, to be ignored."""
        return rows.at[self.starts[self.lines_of(grid), None] + jnp.arange(grid.chunk)].get(mode="clip")

    def to_rows(self, parts: Sequence[Shaped[Array, "lines C ..."]]) -> Shaped[Array, "T ..."]:
        """The inverse of `to_grid` for real rows, from all grids; pad rows repeat some other row."""
        flat = jnp.concatenate([part.reshape(-1, *part.shape[2:]) for part in parts])
        lines = jnp.minimum(self.lines, self.starts.shape[0] - 1)
        chunks = np.repeat([grid.chunk for grid in self.grids], [grid.lines for grid in self.grids])
        firsts, lasts = jnp.asarray(np.cumsum(chunks) - chunks), jnp.asarray(chunks - 1)
        within = jnp.arange(self.lines.shape[0]) - self.starts[lines]
        return flat[firsts[lines] + jnp.clip(within, 0, lasts[lines])]

    @property
    def _first_lines(self) -> list[int]:
        return list(accumulate((grid.lines for grid in self.grids), initial=0))


@dataclass(frozen=True)
class Step:
    """One forward pass: its rows, their places in sequences, and how they go through a layer."""

    packing: Packing
    rows: Rows
    """Those that this device keeps between blocks."""
    residual: Residual
    combine: Combine
    slots: Int32[Array, "L"]
    """Where what is remembered of each line's sequence is kept; beyond all slots for a line without rows."""
    rotations: Mapping[Rotary, CosSin] = field(default_factory=dict)
    """At the rows' positions."""

    @classmethod
    def of(cls, rows: Rows, packing: Packing, route: Route, slots: Int32[Array, "L"] | None = None) -> Step:
        """Of the rows of a token shard; without `slots`, each line is a sequence of its own."""
        slots = jnp.arange(packing.starts.shape[0]) if slots is None else slots
        return cls(packing, route.residual.rows(rows), route.residual, route.combine, slots)

    def with_rotations(self, rotaries: Iterable[Rotary]) -> Step:
        """So that layers that rotate alike do not each compute the cosines and sines."""
        return replace(self, rotations={rotary: rotary.at(self.packing.positions) for rotary in rotaries})

    def rotate(self, x: Float[Array, "T H d"], rotary: Rotary) -> Float[Array, "T H d"]:
        """Each row by its position."""
        return rotary(x, self.rotations.get(rotary) or rotary.at(self.packing.positions))

    @property
    def capacity(self) -> int:
        """T."""
        return self.packing.lines.shape[0]
