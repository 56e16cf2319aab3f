"""The combine strategies.

T  own rows of a token shard     s  token shards that gather together     S  the axes they gather over
N  rows of the buffer            R  the axes of the partial sum           U  those of R that are not in S

                  buffer                              combine                               rows sent, per device
ScatterCombine    each shard's rows, padded           psum_scatter over S, psum over U      (s-1) T
ReduceCombine     all rows, packed                    psum over R                           2 (s-1)/s sum
RaggedCombine     B of each shard, the rest packed    the one for B, the other for the rest
AllToAllCombine   `sharding.all_to_all`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from moe_jax.sharding.collectives import PartialSum, all_gather, axis_index, partial_sum, reduce
from moe_jax.sharding.combine import Combine, Gathered
from moe_jax.sharding.placement import Placement, Role
from moe_jax.sharding.rows import FINE, Rows, bucket, grouped, ladder, masked
from moe_jax.sharding.traffic import Kind, Move, RowBytes, moves, sent_bytes


@dataclass(frozen=True)
class ScatterCombine(Combine):
    """Each device receives the sum of its own rows and nothing else. The buffer is padded, shard after shard: N = s*T.

    Valid rows are a prefix of each shard's part, never of the buffer.
    """

    @classmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> ScatterCombine:
        return cls(placement)

    def holds(self, counts: Sequence[int]) -> bool:
        return True

    def move_in(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        # [T, ...] {V:S} -> [s*T, ...]
        placement = self.placement
        everyone = tuple(all_gather(value, placement.scatter_axes) for value in values)
        valid = None
        if rows.counts is not None:
            valid = (jnp.arange(rows.capacity) < rows.group_counts(placement)[:, None]).reshape(-1)
        return Gathered(everyone, valid, rows, placement.axes(Role.PARTIAL))

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        # [s*T, D] {U:R} -> [T, D] {V:S}, then the sum over the axes that hold no tokens
        return reduce(partial, scatter_over=self.placement.scatter_axes, sum_over=self.placement.sum_axes)

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        here = self.placement
        return moves(Kind.ALL_GATHER, here.scatter_axes, capacity * here.gather_shards, row.all, here)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        here = self.placement
        scatter = moves(Kind.REDUCE_SCATTER, here.scatter_axes, capacity * here.gather_shards, row.combine, here)
        return scatter + moves(Kind.ALL_REDUCE, here.sum_axes, capacity, row.combine, here)


@dataclass(frozen=True)
class ReduceCombine(Combine):
    """Every device receives the sum of all rows and takes its own: the compatibility path, and the better one where
    nothing is scattered or one shard holds most rows. The buffer is packed, real rows first: N = `total`."""

    total: int
    """At least the rows of any group of shards that gather together."""

    @classmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> ReduceCombine:
        return cls(placement, min(bucket(_largest(counts, placement), FINE), capacity * placement.gather_shards))

    def holds(self, counts: Sequence[int]) -> bool:
        return _largest(counts, self.placement) <= self.total

    def move_in(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        ends = jnp.cumsum(rows.group_counts(self.placement))
        pack = self._sum_packed if self._packs_before_moving(rows.capacity) else self._gather_and_pack
        valid = jnp.arange(self.total) < ends[-1]
        packed = tuple(pack(rows, value) for value in values)
        return Gathered(packed, valid, rows, self.placement.axes(Role.PARTIAL))

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        # [total, D] {U:R} -> [total, D] -> [T, D] {V:S}
        rows = gathered.own
        summed = reduce(partial, sum_over=self.placement.axes(Role.PARTIAL))
        own = self._first(rows) + jnp.arange(rows.capacity)
        return masked(summed.at[own].get(mode="clip"), rows.valid(self.placement))

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        axes, here = self.placement.scatter_axes, self.placement
        if self._packs_before_moving(capacity):
            hidden = moves(Kind.ALL_REDUCE, axes, self.total, row.gather, here)
            return hidden + moves(Kind.ALL_REDUCE, axes, self.total, row.metadata, here)
        return moves(Kind.ALL_GATHER, axes, capacity * here.gather_shards, row.all, here)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        return moves(Kind.ALL_REDUCE, self.placement.axes(Role.PARTIAL), self.total, row.combine, self.placement)

    def _packs_before_moving(self, capacity: int) -> bool:
        """Whether a sum of packed rows, which sends each twice, sends less than a gather of padded ones."""
        return 2 * self.total < self.placement.gather_shards * capacity

    def _gather_and_pack(self, rows: Rows, value: Array) -> Array:
        # [T, ...] {V:S} -> [s*T, ...] -> [total, ...]
        counts = rows.group_counts(self.placement)
        ends = jnp.cumsum(counts)
        position = jnp.arange(self.total)
        shard = jnp.minimum(jnp.sum(position[:, None] >= ends, axis=1), counts.shape[0] - 1)
        source = shard * rows.capacity + position - (ends - counts)[shard]
        everyone = all_gather(value, self.placement.scatter_axes)
        return everyone.at[source].get(mode="clip", indices_are_sorted=True)

    def _sum_packed(self, rows: Rows, value: Array) -> Array:
        # [T, ...] {V:S} -> [total, ...] {U:S}, of which each row is zero on all devices but one, -> [total, ...]
        axes, first = self.placement.scatter_axes, self._first(rows)
        own = jnp.arange(self.total) - first
        count = rows.group_counts(self.placement)[axis_index(axes)]
        placed = masked(value.at[own].get(mode="clip"), (own >= 0) & (own < count))
        return reduce(partial_sum(placed, axes), sum_over=axes)

    def _first(self, rows: Rows) -> Int32[Array, ""]:
        """Where own rows begin in the packed buffer."""
        counts = rows.group_counts(self.placement)
        return (jnp.cumsum(counts) - counts)[axis_index(self.placement.scatter_axes)]


@dataclass(frozen=True)
class RaggedCombine(Combine):
    """A base of rows that most shards have is scattered, the overflow of the others is packed and summed: nearly no pad
    rows, and nearly nothing sent twice.

    The two add up in different orders where the partial sum is over several axes: a row's last bits may then depend on
    which of the two it is in, and so on its neighbours.
    """

    base: int
    """Rows of each shard that are scattered, fewer than its capacity; may be 0."""
    overflow: int
    """At least the other rows of any group of shards that gather together."""

    @classmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> RaggedCombine:
        """With the base that sends least."""
        sizes = [
            cls(placement, base, bucket(_largest(_above(base, counts), placement), FINE))
            for base in (0, *ladder(capacity, FINE))
        ]
        rows = RowBytes(gather=1, combine=1)
        return min(
            sizes, key=lambda size: sent_bytes(size.gather_moves(capacity, rows) + size.combine_moves(capacity, rows))
        )

    def holds(self, counts: Sequence[int]) -> bool:
        return _largest(_above(self.base, counts), self.placement) <= self.overflow

    def move_in(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        # [B + rest, ...] {V:S} -> [s*B + overflow, ...]
        if not self.base:
            return self._reduce.move_in(rows, values)
        base = self._scatter.move_in(rows.head(self.base), tuple(value[: self.base] for value in values))
        rest = self._reduce.move_in(rows.tail(self.base), tuple(value[self.base :] for value in values))
        both = tuple(jnp.concatenate(parts) for parts in zip(base.values, rest.values, strict=True))
        valid = jnp.concatenate([_all_if_none(part) for part in (base, rest)])
        return Gathered(both, valid, rows, base.axes)

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        if not self.base:
            return self._reduce.combine(gathered, partial)
        base, rest = partial.split(self.base * self.placement.gather_shards)
        rows = gathered.own
        parts = (
            self._scatter.combine(replace(gathered, own=rows.head(self.base)), base),
            self._reduce.combine(replace(gathered, own=rows.tail(self.base)), rest),
        )
        return jnp.concatenate(parts)

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        return self._scatter.gather_moves(self.base, row) + self._reduce.gather_moves(capacity - self.base, row)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        return self._scatter.combine_moves(self.base, row) + self._reduce.combine_moves(capacity - self.base, row)

    @property
    def _scatter(self) -> ScatterCombine:
        return ScatterCombine(self.placement)

    @property
    def _reduce(self) -> ReduceCombine:
        return ReduceCombine(self.placement, self.overflow)


def _all_if_none(gathered: Gathered) -> Array:
    rows = gathered.values[0].shape[0]
    return jnp.ones(rows, bool) if gathered.valid is None else gathered.valid


def _largest(counts: Sequence[int], placement: Placement) -> int:
    """The rows of the largest group of shards that gather together."""
    return int(grouped(counts, placement).sum(axis=1).max())


def _above(base: int, counts: Sequence[int]) -> Sequence[int]:
    return np.maximum(np.asarray(counts) - base, 0).tolist()
