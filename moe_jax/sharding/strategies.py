"""The combine strategies.

T  own rows of a token shard     s  token shards that gather together     S  the axes they gather over
N  rows of the buffer            R  the axes of the partial sum           U  the axes of R that are not in S

                  buffer                               combine                               rows sent, per device
ScatterCombine    rows of each shard, padded           psum_scatter over S, psum over U      (s-1) T
ReduceCombine     all rows, packed                     psum over R                           2 (s-1)/s sum
RaggedCombine     B rows of each shard, rest packed    scatter for the B, reduce for the rest
AllToAllCombine   see `sharding.all_to_all`
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
from moe_jax.sharding.rows import FINE, Rows, bucket, counts_by_group, ladder, masked
from moe_jax.sharding.traffic import Kind, Move, RowBytes, moves, sent_bytes


@dataclass(frozen=True)
class ScatterCombine(Combine):
    """Each device receives the sum of its own rows only. The buffer has the padded rows of all shards: N = s*T.

    The real rows are a prefix of each shard's part, not of the buffer.
    """

    @classmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> ScatterCombine:
        return cls(placement)

    def holds(self, counts: Sequence[int]) -> bool:
        return True

    def gather_arrays(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        # [T, ...] {V:S} -> [s*T, ...]
        placement = self.placement
        gathered = tuple(all_gather(value, placement.scatter_axes) for value in values)
        valid = None
        if rows.counts is not None:
            valid = (jnp.arange(rows.capacity) < rows.group_counts(placement)[:, None]).reshape(-1)
        return Gathered(gathered, valid, rows, placement.axes(Role.PARTIAL))

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        # [s*T, D] {U:R} -> [T, D] {V:S}, then the sum over the axes that do not split tokens
        return reduce(partial, scatter_over=self.placement.scatter_axes, sum_over=self.placement.sum_axes)

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        placement = self.placement
        rows = capacity * placement.gather_shards
        return moves(Kind.ALL_GATHER, placement.scatter_axes, rows, row.gather_total, placement)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        placement = self.placement
        rows = capacity * placement.gather_shards
        scatter = moves(Kind.REDUCE_SCATTER, placement.scatter_axes, rows, row.combine, placement)
        return scatter + moves(Kind.ALL_REDUCE, placement.sum_axes, capacity, row.combine, placement)


@dataclass(frozen=True)
class ReduceCombine(Combine):
    """Each device receives the sum of all rows and takes its own. The buffer is packed, real rows first: N = `total`.

    This is the compatibility path, and the faster strategy if no axis is scattered over or one shard has most rows.
    """

    total: int
    """Rows of the buffer: at least the rows of any group of shards that gather together."""

    @classmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> ReduceCombine:
        return cls(placement, min(bucket(_largest_group(counts, placement), FINE), capacity * placement.gather_shards))

    def holds(self, counts: Sequence[int]) -> bool:
        return _largest_group(counts, self.placement) <= self.total

    def gather_arrays(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        ends = jnp.cumsum(rows.group_counts(self.placement))
        pack = self._pack_and_sum if self._packs_before_moving(rows.capacity) else self._gather_and_pack
        valid = jnp.arange(self.total) < ends[-1]
        packed = tuple(pack(rows, value) for value in values)
        return Gathered(packed, valid, rows, self.placement.axes(Role.PARTIAL))

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        # [total, D] {U:R} -> [total, D] -> [T, D] {V:S}
        rows = gathered.own
        summed = reduce(partial, sum_over=self.placement.axes(Role.PARTIAL))
        own = self._offset(rows) + jnp.arange(rows.capacity)
        return masked(summed.at[own].get(mode="clip"), rows.valid(self.placement))

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        axes, placement = self.placement.scatter_axes, self.placement
        if self._packs_before_moving(capacity):
            hidden = moves(Kind.ALL_REDUCE, axes, self.total, row.gather, placement)
            return hidden + moves(Kind.ALL_REDUCE, axes, self.total, row.metadata, placement)
        return moves(Kind.ALL_GATHER, axes, capacity * placement.gather_shards, row.gather_total, placement)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        return moves(Kind.ALL_REDUCE, self.placement.axes(Role.PARTIAL), self.total, row.combine, self.placement)

    def _packs_before_moving(self, capacity: int) -> bool:
        """Return True if summing packed rows, which sends each twice, sends fewer rows than gathering padded ones."""
        return 2 * self.total < self.placement.gather_shards * capacity

    def _gather_and_pack(self, rows: Rows, value: Array) -> Array:
        # [T, ...] {V:S} -> [s*T, ...] -> [total, ...]
        counts = rows.group_counts(self.placement)
        ends = jnp.cumsum(counts)
        position = jnp.arange(self.total)
        shard = jnp.minimum(jnp.sum(position[:, None] >= ends, axis=1), counts.shape[0] - 1)
        source = shard * rows.capacity + position - (ends - counts)[shard]
        gathered = all_gather(value, self.placement.scatter_axes)
        return gathered.at[source].get(mode="clip", indices_are_sorted=True)

    def _pack_and_sum(self, rows: Rows, value: Array) -> Array:
        # [T, ...] {V:S} -> [total, ...] {U:S}, each row zero on all devices but one, -> [total, ...]
        axes = self.placement.scatter_axes
        own = jnp.arange(self.total) - self._offset(rows)
        count = rows.group_counts(self.placement)[axis_index(axes)]
        packed = masked(value.at[own].get(mode="clip"), (own >= 0) & (own < count))
        return reduce(partial_sum(packed, axes), sum_over=axes)

    def _offset(self, rows: Rows) -> Int32[Array, ""]:
        """Index of the first own row in the packed buffer."""
        counts = rows.group_counts(self.placement)
        return (jnp.cumsum(counts) - counts)[axis_index(self.placement.scatter_axes)]


@dataclass(frozen=True)
class RaggedCombine(Combine):
    """Scatter the first `base` rows of each shard; pack the other rows and reduce them.

    Few pad rows are sent, and few rows are sent twice. If the partial sum is over several axes, the two parts add up in
    different orders: the last bits of a row may depend on the part it is in, and so on the counts of other shards.
    """

    base: int
    """Rows of each shard that are scattered, fewer than its capacity; may be 0."""
    overflow: int
    """Rows of the packed part: at least the other rows of any group of shards that gather together."""

    @classmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> RaggedCombine:
        """Create the strategy with the base that sends the fewest rows."""
        sizes = [
            cls(placement, base, bucket(_largest_group(_above(base, counts), placement), FINE))
            for base in (0, *ladder(capacity, FINE))
        ]
        row = RowBytes(gather=1, combine=1)
        return min(
            sizes, key=lambda size: sent_bytes(size.gather_moves(capacity, row) + size.combine_moves(capacity, row))
        )

    def holds(self, counts: Sequence[int]) -> bool:
        return _largest_group(_above(self.base, counts), self.placement) <= self.overflow

    def gather_arrays(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        # [B + rest, ...] {V:S} -> [s*B + overflow, ...]
        if not self.base:
            return self._reduce.gather_arrays(rows, values)
        base = self._scatter.gather_arrays(rows.head(self.base), tuple(value[: self.base] for value in values))
        rest = self._reduce.gather_arrays(rows.tail(self.base), tuple(value[self.base :] for value in values))
        both = tuple(jnp.concatenate(parts) for parts in zip(base.values, rest.values, strict=True))
        valid = jnp.concatenate([_valid(part) for part in (base, rest)])
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


def _valid(gathered: Gathered) -> Array:
    rows = gathered.values[0].shape[0]
    return jnp.ones(rows, bool) if gathered.valid is None else gathered.valid


def _largest_group(counts: Sequence[int], placement: Placement) -> int:
    """Number of rows of the largest group of shards that gather together."""
    return int(counts_by_group(counts, placement).sum(axis=1).max())


def _above(base: int, counts: Sequence[int]) -> Sequence[int]:
    """Number of rows of each shard after the first `base`."""
    return np.maximum(np.asarray(counts) - base, 0).tolist()
