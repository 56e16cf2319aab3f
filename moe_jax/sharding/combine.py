"""How a feed-forward block gets its rows and gives them back: gather, compute a partial sum, combine.

    T  own rows of a token shard (its capacity)     s  token shards that gather together
    N  rows of the buffer                           R  the axes over which the output is a partial sum (Role.PARTIAL)

A strategy is one object with both directions, because they share the form of the buffer (`sharding.strategies`). Each
is exact for any counts that it holds; they differ in what they move, which `sharding.policy` weighs. The idea is that
of SGLang's pull requests 22642 (reduce-scatter where others sum everything and slice) and 23731 (one place that
decides).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from jaxtyping import Array, Bool, Float

from moe_jax.errors import ReductionError
from moe_jax.sharding.collectives import PartialSum, all_gather_same, partial_sum, reduce
from moe_jax.sharding.placement import Placement, Role
from moe_jax.sharding.rows import Rows, masked
from moe_jax.sharding.traffic import Move


@dataclass(frozen=True)
class Gathered:
    """The rows of all token shards that meet in one buffer, and which of them are real."""

    values: tuple[Array, ...]
    valid: Bool[Array, "N"] | None
    """`None` where all are."""
    rows: int
    axes: tuple[str, ...]

    def partial_sum(self, value: Float[Array, "N D"]) -> PartialSum:
        """This device's part of the output of the gathered rows, zero in pad rows whatever stood there.

        Raises:
          ReductionError: not as many rows as were gathered, as in a value that was combined already.
        """
        if value.shape[0] != self.rows:
            raise ReductionError(
                f"a partial sum of gathered rows has {self.rows} rows, this has {value.shape[0]}: "
                "compute it from what combine.gather returned; own rows that were combined need no further sum"
            )
        return partial_sum(masked(value, self.valid), self.axes)


@dataclass(frozen=True)
class Combine(ABC):
    """A strategy with the sizes of its buffers: every feed-forward block calls `gather`, computes, calls `combine`."""

    placement: Placement

    @classmethod
    @abstractmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> Self:
        """The strategy, its buffers large enough for these counts; sizes come from a ladder, to compile few
        programs."""

    @abstractmethod
    def holds(self, counts: Sequence[int]) -> bool:
        """Whether the buffers are large enough for these counts."""

    @abstractmethod
    def gather(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        """Own rows of this shard and of those that share its experts: `[T, ...] {V:tokens} -> [N, ...]`."""

    @abstractmethod
    def combine(self, rows: Rows, partial: PartialSum) -> Float[Array, "T D"]:
        """The sum over R, own rows only, zero in pad rows: `[N, D] {U:R} -> [T, D] {V:tokens}`."""

    @abstractmethod
    def gather_moves(self, capacity: int) -> tuple[Move, ...]:
        """The collectives of `gather` for one value, for rows of this capacity."""

    @abstractmethod
    def combine_moves(self, capacity: int) -> tuple[Move, ...]:
        """The collectives of `combine`."""

    def sum_heads(self, partial: PartialSum) -> Float[Array, "T D"]:
        """The sum of the parts that the heads axes hold: `[T, D] {U:heads} -> [T, D]`."""
        return reduce(partial, sum_over=self.placement.axes(Role.HEADS))

    def heads_partial_sum(self, value: Float[Array, "T D"]) -> PartialSum:
        """This device's part, from its own heads or vocabulary, of a value of own rows."""
        return partial_sum(value, self.placement.axes(Role.HEADS))

    def gather_heads(self, value: Float[Array, "T V"]) -> Float[Array, "T vocab"]:
        """The columns that the heads axes hold, side by side: `[T, V] {V:heads} -> [T, n*V]`."""
        return all_gather_same(value, self.placement.axes(Role.HEADS), dim=1)
