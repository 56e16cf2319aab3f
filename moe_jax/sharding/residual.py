"""Residual layouts: the rows of a token shard that a device keeps between blocks, if attention heads are split too.

T  rows of a token shard     h  heads devices of a token shard     B  rows that a device keeps     D  hidden

                 keeps         before attention           after attention
WholeResidual    all, B = T    nothing                    psum over heads
SplitResidual    a part        all_gather over heads      psum_scatter over heads

A feed-forward block treats the kept rows as the rows of a token shard. Under `SplitResidual` every device is a token
shard, so the block gathers and scatters over all of its axes, and no axis is left to sum over. This is the sequence
parallelism of Korthikanti et al. (arXiv:2205.05198), applied to the rows of a batch.
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
    """Layout of the residual rows between blocks, with the collectives of attention and of the vocabulary."""

    placement: Placement
    """Placement of the parameters."""

    @property
    @abstractmethod
    def ffn_placement(self) -> Placement:
        """Placement of the kept rows, as feed-forward blocks use it."""

    @abstractmethod
    def capacity(self, capacity: int) -> int:
        """Number of rows B that a device keeps of a token shard of `capacity` rows."""

    @abstractmethod
    def counts(self, counts: Sequence[int], capacity: int) -> Sequence[int]:
        """Real rows of each token shard of `ffn_placement`."""

    @abstractmethod
    def rows(self, rows: Rows) -> Rows:
        """The kept rows, as rows of `ffn_placement`."""

    @abstractmethod
    def heads_partial_sum(self, value: Float[Array, "T D"]) -> PartialSum:
        """Declare `value`, from the heads or the vocabulary of this device, to be a part of a sum over HEADS."""

    @abstractmethod
    def sum_heads(self, partial: PartialSum) -> Float[Array, "B D"]:
        """Sum the parts of the heads devices, and return the kept rows."""

    @abstractmethod
    def all_rows(self, x: Float[Array, "B D"], capacity: int) -> Float[Array, "T D"]:
        """Return all `capacity` rows of the token shard."""

    @abstractmethod
    def moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        """List the collectives of one layer's attention for token shards of `capacity` rows."""

    def gather_columns(self, value: Float[Array, "T V"]) -> Float[Array, "T vocab"]:
        """Concatenate the columns of the heads devices: `[T, V] {V:heads} -> [T, h*V]`."""
        return all_gather_same(value, self.placement.axes(Role.HEADS), dim=1)


@dataclass(frozen=True)
class WholeResidual(ResidualLayout):
    """Every heads device keeps all rows of its token shard."""

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
    """Each heads device keeps an equal part of the rows of its token shard, in the order of the devices."""

    @property
    def ffn_placement(self) -> Placement:
        placement = self.placement
        split = placement.tokens + placement.heads
        return replace(placement, tokens=tuple(axis for axis in AXES if axis in split), heads=())

    def capacity(self, capacity: int) -> int:
        return -(-capacity // self.placement.size(Role.HEADS))

    def counts(self, counts: Sequence[int], capacity: int) -> Sequence[int]:
        return self._split_counts(np.asarray(counts), capacity).tolist()

    def rows(self, rows: Rows) -> Rows:
        capacity, heads = self.capacity(rows.capacity), self.placement.size(Role.HEADS)
        if rows.counts is None and capacity * heads == rows.capacity:
            return Rows.full(capacity)
        counts = rows.counts
        if counts is None:
            counts = jnp.full(self.placement.size(Role.TOKENS), rows.capacity, jnp.int32)
        return Rows(self._split_counts(counts, rows.capacity), capacity)

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
        placement = self.placement
        rows = self.capacity(capacity) * placement.size(Role.HEADS)
        return tuple(
            move
            for kind in (Kind.ALL_GATHER, Kind.REDUCE_SCATTER)
            for move in moves(kind, placement.axes(Role.HEADS), rows, row.combine, placement)
        )

    def _split_counts(self, counts: Counts, capacity: int) -> Counts:
        """Split the count of each token shard over its heads devices; both are in mesh order."""
        placement, kept = self.placement, self.capacity(capacity)
        sizes = [(placement.mesh.shape[axis], axis in placement.heads) for axis in AXES]
        by_shard = counts.reshape([1 if is_heads else size for size, is_heads in sizes])
        firsts = kept * np.arange(placement.size(Role.HEADS))
        firsts = firsts.reshape([size if is_heads else 1 for size, is_heads in sizes])
        return (by_shard - firsts).clip(0, kept).reshape(-1)


RESIDUALS: dict[str, type[ResidualLayout]] = {"whole": WholeResidual, "split": SplitResidual}
"""Residual layouts by the value of the option `residual`."""
