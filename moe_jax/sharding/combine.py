"""How a feed-forward block gets its rows and gives them back: gather, compute a partial sum, combine.

    T  own rows of a token shard (its capacity)     s  token shards that gather together
    N  rows of the buffer                           R  the axes over which the output is a partial sum (Role.PARTIAL)

A strategy is one object with both directions, because they share the form of the buffer. Each is exact for any
counts; they differ in the rows that they move, which `sharding.policy` weighs. The idea is that of SGLang's pull
requests 22642 (reduce-scatter where others sum everything and slice) and 23731 (one place that decides).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.errors import ReductionError
from moe_jax.sharding.collectives import PartialSum, all_gather, all_gather_same, axis_index, partial_sum, reduce
from moe_jax.sharding.placement import Placement, Role
from moe_jax.sharding.rows import Rows


@dataclass(frozen=True)
class Gathered:
    """The rows of all token shards that meet in one buffer, and which of them are real."""

    values: tuple[Array, ...]
    valid: Bool[Array, "N"]
    axes: tuple[str, ...]

    def partial_sum(self, value: Float[Array, "N D"]) -> PartialSum:
        """This device's part of the output of the gathered rows, zero in pad rows whatever stood there.

        Raises:
          ReductionError: not as many rows as were gathered, as in a value that was combined already.
        """
        if value.shape[0] != self.valid.shape[0]:
            raise ReductionError(
                f"a partial sum of gathered rows has {self.valid.shape[0]} rows, this has {value.shape[0]}: "
                "compute it from what combine.gather returned; own rows that were combined need no further sum"
            )
        return partial_sum(jnp.where(self.valid[:, None], value, 0), self.axes)


@dataclass(frozen=True)
class Combine(ABC):
    """A strategy: every feed-forward block calls `gather`, computes, and calls `combine`."""

    placement: Placement

    @abstractmethod
    def gather(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        """Own rows of this shard and of those that share its experts: `[T, ...] {V:tokens} -> [N, ...]`."""

    @abstractmethod
    def combine(self, rows: Rows, partial: PartialSum) -> Float[Array, "T D"]:
        """The sum over R, own rows only, zero in pad rows: `[N, D] {U:R} -> [T, D] {V:tokens}`."""

    def sized(self, rows: Rows) -> Rows:
        """The rows with the sizes that this strategy does not look at made canonical, to compile fewer programs."""
        return rows

    @abstractmethod
    def sent_rows(self, capacity: int, total: int) -> float:
        """Rows that each device sends in one `combine`, for `Rows` of these sizes, by a ring."""

    def sum_heads(self, partial: PartialSum) -> Float[Array, "T D"]:
        """The sum of the parts that the heads axes hold: `[T, D] {U:heads} -> [T, D]`."""
        return reduce(partial, sum_over=self.placement.axes(Role.HEADS))

    def heads_partial_sum(self, value: Float[Array, "T D"]) -> PartialSum:
        """This device's part, from its own heads or vocabulary, of a value of own rows."""
        return partial_sum(value, self.placement.axes(Role.HEADS))

    def gather_heads(self, value: Float[Array, "T V"]) -> Float[Array, "T vocab"]:
        """The columns that the heads axes hold, side by side: `[T, V] {V:heads} -> [T, n*V]`."""
        return all_gather_same(value, self.placement.axes(Role.HEADS), dim=1)

    @property
    def _partial_axes(self) -> tuple[str, ...]:
        return self.placement.axes(Role.PARTIAL)


@dataclass(frozen=True)
class ScatterCombine(Combine):
    """Each device receives the sum of its own rows and nothing else. The buffer is padded, shard after shard: N = s*T.

    Valid rows are a prefix of each shard's part, never of the buffer.
    """

    def gather(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        # [T, ...] {V:scatter} -> [s*T, ...]
        axes = self.placement.scatter_axes
        counts = rows.group_counts(self.placement)
        valid = (jnp.arange(rows.capacity) < counts[:, None]).reshape(-1)
        return Gathered(tuple(all_gather(value, axes) for value in values), valid, self._partial_axes)

    def combine(self, rows: Rows, partial: PartialSum) -> Float[Array, "T D"]:
        # [s*T, D] {U:R} -> [T, D] {V:scatter}, then the sum over the axes that hold no tokens
        return reduce(partial, scatter_over=self.placement.scatter_axes, sum_over=self.placement.sum_axes)

    def sized(self, rows: Rows) -> Rows:
        return replace(rows, total=rows.capacity * self.placement.gather_shards)

    def sent_rows(self, capacity: int, total: int) -> float:
        others = math.prod(self.placement.mesh.shape[axis] for axis in self.placement.sum_axes)
        return capacity * (self.placement.gather_shards - 1 + 2 * (others - 1) / others)


@dataclass(frozen=True)
class ReduceCombine(Combine):
    """Every device receives the sum of all rows and takes its own: the compatibility path, and the better one where
    nothing is scattered or one shard holds most rows. The buffer is packed: N = `rows.total`, real rows first."""

    def gather(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        # [T, ...] {V:scatter} -> [s*T, ...] -> [total, ...]
        counts = rows.group_counts(self.placement)
        ends = jnp.cumsum(counts)
        position = jnp.arange(rows.total)
        shard = jnp.minimum(jnp.sum(position[:, None] >= ends, axis=1), counts.shape[0] - 1)
        source = shard * rows.capacity + position - (ends - counts)[shard]
        packed = tuple(
            all_gather(value, self.placement.scatter_axes).at[source].get(mode="clip", indices_are_sorted=True)
            for value in values
        )
        return Gathered(packed, position < ends[-1], self._partial_axes)

    def combine(self, rows: Rows, partial: PartialSum) -> Float[Array, "T D"]:
        # [total, D] {U:R} -> [total, D] -> [T, D] {V:scatter}
        summed = reduce(partial, sum_over=self._partial_axes)
        return jnp.where(rows.valid(self.placement)[:, None], summed.at[self._own(rows)].get(mode="clip"), 0)

    def _own(self, rows: Rows) -> Int32[Array, "T"]:
        counts = rows.group_counts(self.placement)
        first = (jnp.cumsum(counts) - counts)[axis_index(self.placement.scatter_axes)]
        return first + jnp.arange(rows.capacity)

    def sent_rows(self, capacity: int, total: int) -> float:
        devices = self.placement.size(Role.PARTIAL)
        return total * 2 * (devices - 1) / devices
