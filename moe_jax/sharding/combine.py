"""Base class of the combine strategies: gather rows, compute a partial sum from them, combine the sum.

    T  own rows of a token shard (its capacity)     s  token shards that gather together
    N  rows of the buffer                           R  the axes over which the output is a partial sum (Role.PARTIAL)
    D  hidden     E  experts     k  experts per row

A strategy implements both directions, because they share the layout of the buffer (`sharding.strategies`). Every
strategy is exact for any counts that its buffers hold; strategies differ in the bytes they move, which
`sharding.policy` compares. The idea comes from SGLang's pull requests 22642 (a reduce-scatter instead of an all-reduce
and a slice) and 23731 (one place that decides).
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
    """Rows of several token shards in one buffer, with a mask of the real rows."""

    values: tuple[Array, ...]
    """Arrays `[N, ...]`: the hidden rows, then their metadata."""
    valid: Bool[Array, "N"] | None
    """True for real rows; `None` if all rows are real."""
    own: Rows
    """Rows of this token shard."""
    axes: tuple[str, ...]
    """The axes R."""
    exchanged: tuple[str, ...] = ()
    """Axes along which each device was sent different rows."""

    def partial_sum(self, value: Float[Array, "N D"]) -> PartialSum:
        """Declare `value` to be this device's part of the output of the gathered rows, and zero its pad rows.

        Raises:
          ReductionError: `value` has another number of rows, as a value that was combined already has.
        """
        rows = self.values[0].shape[0]
        if value.shape[0] != rows:
            raise ReductionError(
                f"a partial sum of gathered rows has {rows} rows, this has {value.shape[0]}: "
                "compute it from the result of combine.gather; own rows that were combined need no further sum"
            )
        return partial_sum(masked(value, self.valid), self.axes, exchanged=self.exchanged)


@dataclass(frozen=True)
class Combine(ABC):
    """A strategy with its buffer sizes.

    A feed-forward block calls `gather` or `dispatch`, computes its partial sum, and calls `combine`.
    """

    placement: Placement
    encoding: Encoding = field(default=EXACT, kw_only=True)

    @classmethod
    @abstractmethod
    def sized(cls, placement: Placement, counts: Sequence[int], capacity: int) -> Self:
        """Create the strategy with buffers for these counts, their sizes rounded up so that few programs are
        compiled."""

    @abstractmethod
    def holds(self, counts: Sequence[int]) -> bool:
        """Return True if the buffers are large enough for these counts."""

    def gather(self, rows: Rows, x: Float[Array, "T D"], *metadata: Shaped[Array, "T _"]) -> Gathered:
        """Gather the rows of all token shards that share experts: `[T, ...] {V:tokens} -> [N, ...]`.

        Args:
          metadata: further columns of each row, of numbers that float32 represents; they are sent as one array.
        """
        encoded, scales = self.encoding.encode(x)
        gathered = self.gather_arrays(rows, (encoded, *join_columns(scales, *metadata)))
        encoded, *columns = gathered.values
        scales, *columns = split_columns(columns, scales, *metadata)
        return replace(gathered, values=(self.encoding.decode(encoded, scales, x.dtype), *columns))

    def dispatch(
        self,
        rows: Rows,
        x: Float[Array, "T D"],
        experts: Int32[Array, "T k"],
        weights: Float[Array, "T k"],
        num_local_experts: int,
    ) -> Gathered:
        """Gather at least the rows routed to the experts of this device, with their expert ids and weights.

        Args:
          experts: expert ids of each row; pad rows have the id E, which no expert has.
          num_local_experts: number of experts on each device.
        """
        del num_local_experts
        return self.gather(rows, x, experts, weights)

    @abstractmethod
    def gather_arrays(self, rows: Rows, values: tuple[Array, ...]) -> Gathered:
        """Run the collectives of `gather`: `[T, ...] {V:tokens} -> [N, ...]`."""

    @abstractmethod
    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        """Sum over R and return own rows, with pad rows zero: `[N, D] {U:R} -> [T, D] {V:tokens}`."""

    @abstractmethod
    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        """List the collectives of `dispatch` for token shards of `capacity` rows."""

    @abstractmethod
    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        """List the collectives of `combine` for token shards of `capacity` rows."""


def join_columns(*columns: Shaped[Array, "T _"]) -> tuple[Float[Array, "T c"], ...]:
    """Concatenate columns as one float32 array; return an empty tuple if there are no columns."""
    present = [value.astype(jnp.float32) for value in columns if value.shape[1]]
    return (jnp.concatenate(present, axis=1),) if present else ()


def split_columns(joined: Sequence[Float[Array, "N c"]], *like: Shaped[Array, "T _"]) -> list[Array]:
    """Invert `join_columns`; widths and dtypes are those of `like`, which may have another number of rows."""
    if not joined:
        return list(like)
    (values,) = joined
    ends = np.cumsum([value.shape[1] for value in like])[:-1].tolist()
    return [part.astype(value.dtype) for part, value in zip(jnp.split(values, ends, axis=1), like, strict=True)]
