"""How a feed-forward block gets its rows and gives them back: gather, compute a partial sum, combine.

    T  own rows of a token shard (its capacity)     s  token shards that gather together
    N  rows of the buffer                           R  the axes over which the output is a partial sum (Role.PARTIAL)
    D  hidden     E  experts     k  experts per row

A strategy is one object with both directions, because they share the form of the buffer (`sharding.strategies`). Each
is exact for any counts that it holds; they differ in what they move, which `sharding.policy` weighs. The idea is that
of SGLang's pull requests 22642 (reduce-scatter where others sum everything and slice) and 23731 (one place that
decides).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Shaped

from moe_jax.errors import ReductionError
from moe_jax.sharding.collectives import PartialSum, partial_sum
from moe_jax.sharding.encoding import EXACT, Encoding
from moe_jax.sharding.placement import Placement
from moe_jax.sharding.rows import Rows, masked
from moe_jax.sharding.traffic import Move, RowBytes


@dataclass(frozen=True)
class Gathered:
    """The rows of all token shards that meet in one buffer, and which of them are real."""

    values: tuple[Array, ...]
    valid: Bool[Array, "N"] | None
    """`None` where all are."""
    own: Rows
    """Those of this shard."""
    axes: tuple[str, ...]
    """R."""
    exchanged: tuple[str, ...] = ()
    """Axes along which other rows were sent to each device."""

    def partial_sum(self, value: Float[Array, "N D"]) -> PartialSum:
        """This device's part of the output of the gathered rows, zero in pad rows whatever stood there.

        Raises:
          ReductionError: not as many rows as were gathered, as in a value that was combined already.
        """
        rows = self.values[0].shape[0]
        if value.shape[0] != rows:
            raise ReductionError(
                f"a partial sum of gathered rows has {rows} rows, this has {value.shape[0]}: "
                "compute it from what combine.gather returned; own rows that were combined need no further sum"
            )
        return partial_sum(masked(value, self.valid), self.axes, exchanged=self.exchanged)


@dataclass(frozen=True)
class Combine(ABC):
    """A strategy with the sizes of its buffers: every feed-forward block calls `gather` or `dispatch`, computes, calls
    `combine`."""

    placement: Placement
    encoding: Encoding = field(default=EXACT, kw_only=True)

    @classmethod
    @abstractmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> Self:
        """The strategy, its buffers large enough for these counts; sizes come from a ladder, to compile few
        programs."""

    @abstractmethod
    def holds(self, counts: Sequence[int]) -> bool:
        """Whether the buffers are large enough for these counts."""

    def gather(self, rows: Rows, x: Float[Array, "T D"], *beside: Shaped[Array, "T _"]) -> Gathered:
        """Own rows of this shard and of those that share its experts: `[T, ...] {V:tokens} -> [N, ...]`.

        Args:
          beside: what goes with the rows, numbers that float32 holds; it travels together, in one array.
        """
        sent, scales = self.encoding.encode(x)
        gathered = self.move_in(rows, (sent, *side_by_side(scales, *beside)))
        everyone, *others = gathered.values
        scales, *others = apart(others, scales, *beside)
        return replace(gathered, values=(self.encoding.decode(everyone, scales, x.dtype), *others))

    def dispatch(
        self, rows: Rows, x: Float[Array, "T D"], experts: Int32[Array, "T k"], weights: Float[Array, "T k"], held: int
    ) -> Gathered:
        """At least the rows that visit the experts held here, with all their experts and weights.

        Args:
          experts: E, which is none, for pad rows.
          held: how many experts a device holds.
        """
        del held
        return self.gather(rows, x, experts, weights)

    @abstractmethod
    def move_in(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        """The collectives of `gather`: `[T, ...] {V:tokens} -> [N, ...]`."""

    @abstractmethod
    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        """The sum over R, own rows only, zero in pad rows: `[N, D] {U:R} -> [T, D] {V:tokens}`."""

    @abstractmethod
    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        """The collectives of `dispatch`, for rows of this capacity."""

    @abstractmethod
    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        """The collectives of `combine`."""


def side_by_side(*columns: Shaped[Array, "T _"]) -> tuple[Float[Array, "T c"], ...]:
    """One float32 array of all columns, or none if there are none."""
    present = [value.astype(jnp.float32) for value in columns if value.shape[1]]
    return (jnp.concatenate(present, axis=1),) if present else ()


def apart(joined: Sequence[Float[Array, "N c"]], *like: Shaped[Array, "T _"]) -> list[Array]:
    """The inverse of `side_by_side` for more rows, with the columns and dtypes of `like`."""
    if not joined:
        return list(like)
    (values,) = joined
    ends = np.cumsum([value.shape[1] for value in like])[:-1].tolist()
    return [part.astype(value.dtype) for part, value in zip(jnp.split(values, ends, axis=1), like, strict=True)]
