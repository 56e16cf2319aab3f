"""Which rows of its token shard a device keeps between blocks, where attention heads are split too.

T  rows of a token shard     h  heads devices of it     B  rows that a device keeps     D  hidden

                 keeps         before attention           after attention
WholeResidual    all, B = T    nothing                    psum over heads
SplitResidual    a part        all_gather over heads      psum_scatter over heads

A feed-forward block sees the rows that are kept as those of a token shard: under `SplitResidual` every device is one,
so that it gathers and scatters over all of its axes, and nothing is left to sum. This is the sequence parallelism of
Korthikanti et al. (arXiv:2205.05198), for rows of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from moe_jax.sharding.collectives import PartialSum, all_gather_same, partial_sum, reduce
from moe_jax.sharding.mesh import AXES
from moe_jax.sharding.placement import Placement, Role
from moe_jax.sharding.rows import Rows
from moe_jax.sharding.traffic import Kind, Move, RowBytes, moves

Counts = TypeVar("Counts", Array, np.ndarray)


@dataclass(frozen=True)
class ResidualLayout(ABC):
    """What attention and the vocabulary need of other devices; the placement is that of the parameters."""

    placement: Placement

    @property
    @abstractmethod
    def ffn_placement(self) -> Placement:
        """The placement that feed-forward blocks see."""

    @abstractmethod
    def capacity(self, capacity: int) -> int:
        """B, for T."""

    @abstractmethod
    def counts(self, counts: Sequence[int], capacity: int) -> Sequence[int]:
        """Real rows of each token shard of `ffn_placement`."""

    @abstractmethod
    def rows(self, rows: Rows) -> Rows:
        """Those that are kept."""

    @abstractmethod
    def heads_partial_sum(self, value: Float[Array, "T D"]) -> PartialSum:
        """This device's part, from its own heads or vocabulary, of a value of all rows of the token shard."""

    @abstractmethod
    def sum_heads(self, partial: PartialSum) -> Float[Array, "B D"]:
        """The sum of the parts that the heads devices hold, of the rows that are kept."""

    @abstractmethod
    def all_rows(self, x: Float[Array, "B D"], capacity: int) -> Float[Array, "T D"]:
        """All rows of the token shard, `capacity` of them."""

    @abstractmethod
    def moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        """The collectives of one layer's attention."""

    def gather_columns(self, value: Float[Array, "T V"]) -> Float[Array, "T vocab"]:
        """The columns that the heads devices hold, side by side: `[T, V] {V:heads} -> [T, h*V]`."""
        return all_gather_same(value, self.placement.axes(Role.HEADS), dim=1)


@dataclass(frozen=True)
class WholeResidual(ResidualLayout):
    """All rows on every heads device."""

    @property
    def ffn_placement(self) -> Placement:
        return self.placement

    def capacity(self, capacity: int) -> int:
        return capacity

    def counts(self, counts: Sequence[int], capacity: int) -> Sequence[int]:
        return counts

    def rows(self, rows: Rows) -> Rows:
        return rows

    def heads_partial_sum(self, value: Float[Array, "T D"]) -> PartialSum:
        return partial_sum(value, self.placement.axes(Role.HEADS))

    def sum_heads(self, partial: PartialSum) -> Float[Array, "B D"]:
        # [T, D] {U:heads} -> [T, D]
        return reduce(partial, sum_over=self.placement.axes(Role.HEADS))

    def all_rows(self, x: Float[Array, "B D"], capacity: int) -> Float[Array, "T D"]:
        return x

    def moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        return moves(Kind.ALL_REDUCE, self.placement.axes(Role.HEADS), capacity, row.combine, self.placement)


@dataclass(frozen=True)
class SplitResidual(ResidualLayout):
    """Each heads device keeps as many rows as the others, the first device the first ones."""

    @property
    def ffn_placement(self) -> Placement:
        here = self.placement
        both = here.tokens + here.heads
        return replace(here, tokens=tuple(axis for axis in AXES if axis in both), heads=())

    def capacity(self, capacity: int) -> int:
        return -(-capacity // self.placement.size(Role.HEADS))

    def counts(self, counts: Sequence[int], capacity: int) -> Sequence[int]:
        return self._parts(np.asarray(counts), capacity).tolist()

    def rows(self, rows: Rows) -> Rows:
        capacity, heads = self.capacity(rows.capacity), self.placement.size(Role.HEADS)
        if rows.counts is None and capacity * heads == rows.capacity:
            return Rows.full(capacity)
        counts = rows.counts
        if counts is None:
            counts = jnp.full(self.placement.size(Role.TOKENS), rows.capacity, jnp.int32)
        return Rows(self._parts(counts, rows.capacity), capacity)

    def heads_partial_sum(self, value: Float[Array, "T D"]) -> PartialSum:
        pad = self.capacity(value.shape[0]) * self.placement.size(Role.HEADS) - value.shape[0]
        return partial_sum(jnp.pad(value, ((0, pad), (0, 0))), self.placement.axes(Role.HEADS))

    def sum_heads(self, partial: PartialSum) -> Float[Array, "B D"]:
        # [h*B, D] {U:heads} -> [B, D] {V:heads}
        return reduce(partial, scatter_over=self.placement.axes(Role.HEADS))

    def all_rows(self, x: Float[Array, "B D"], capacity: int) -> Float[Array, "T D"]:
        # [B, D] {V:heads} -> [h*B, D] -> [T, D]
        return all_gather_same(x, self.placement.axes(Role.HEADS))[:capacity]

    def moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        here, rows = self.placement, self.capacity(capacity) * self.placement.size(Role.HEADS)
        return tuple(
            move
            for kind in (Kind.ALL_GATHER, Kind.REDUCE_SCATTER)
            for move in moves(kind, here.axes(Role.HEADS), rows, row.combine, here)
        )

    def _parts(self, counts: Counts, capacity: int) -> Counts:
        """Of each shard's count, what lies in the part of each heads device; both in mesh order."""
        here, part = self.placement, self.capacity(capacity)
        sizes = [(here.mesh.shape[axis], axis in here.heads) for axis in AXES]
        of_shards = counts.reshape([1 if heads else size for size, heads in sizes])
        firsts = part * np.arange(here.size(Role.HEADS)).reshape([size if heads else 1 for size, heads in sizes])
        return (of_shards - firsts).clip(0, part).reshape(-1)


RESIDUALS: dict[str, type[ResidualLayout]] = {"whole": WholeResidual, "split": SplitResidual}
"""By the name that users ask for."""
