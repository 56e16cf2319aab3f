"""Token rows: ragged in truth, rectangular in memory.

T  capacity: rows held by each token shard, real ones first
s  token shards that gather together
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from moe_jax.sharding.collectives import axis_index
from moe_jax.sharding.placement import Placement, Role

FINE = 16
"""Sizes per doubling in the ladder of row buffers: at most a sixteenth is padding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """How many of each token shard's `capacity` rows are real. Every device knows all counts, so it can build every
    mask.

    Make it with `Rows.of`, which checks the counts; inside a compiled program they are data and cannot be checked.
    """

    counts: Int32[Array, "shards"] | None
    """Real rows per token shard, shards in mesh order, the same on every device; `None` where all are always real, so
    that nothing is masked."""
    capacity: int = field(metadata={"static": True})

    @classmethod
    def of(cls, counts: Sequence[int], placement: Placement, capacity: int | None = None) -> Rows:
        """Rows for these counts, the capacity by default from the ladder of `bucket`, to compile few programs.

        Raises:
          ValueError: not one count per token shard, one below 0 or above `capacity`.
        """
        array = np.asarray(counts, np.int32)
        shards = placement.size(Role.TOKENS)
        if array.shape != (shards,):
            raise ValueError(f"expected one count for each of {shards} token shards, got {list(counts)}")
        capacity = bucket(int(array.max()), FINE) if capacity is None else capacity
        if array.min() < 0 or array.max() > capacity:
            raise ValueError(f"counts must lie between 0 and the capacity {capacity}, got {list(counts)}")
        return cls(on_host(array), capacity)

    @classmethod
    def full(cls, capacity: int) -> Rows:
        """Every row of every shard real."""
        return cls(None, capacity)

    def head(self, base: int) -> Rows:
        """The first `base` rows of each shard."""
        return Rows(None if self.counts is None else jnp.minimum(self.counts, base), base)

    def tail(self, base: int) -> Rows:
        """The rows of each shard after the first `base`."""
        return Rows(None if self.counts is None else jnp.maximum(self.counts - base, 0), self.capacity - base)

    def valid(self, placement: Placement) -> Bool[Array, "T"] | None:
        """Which of this shard's own rows are real; `None` for all."""
        if self.counts is None:
            return None
        return jnp.arange(self.capacity) < self.counts[placement.index(Role.TOKENS)]

    def group_counts(self, placement: Placement) -> Int32[Array, "s"]:
        """The counts of the shards that gather with this one, in gathering order."""
        if self.counts is None:
            return jnp.full(placement.gather_shards, self.capacity, jnp.int32)
        axes = placement.axes(Role.TOKENS)
        grid = self.counts.reshape([placement.mesh.shape[axis] for axis in axes])
        here = (slice(None) if axis in placement.scatter_axes else axis_index((axis,)) for axis in axes)
        return grid[tuple(here)].reshape(placement.gather_shards)


def masked(values: Array, valid: Bool[Array, "T"] | None) -> Array:
    """Zero in rows that are not real, whatever stood there."""
    return values if valid is None else jnp.where(valid.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)


def on_host(array: np.ndarray) -> Array:
    """A NumPy array, typed as the device array that it becomes when a program takes it."""
    return cast(Array, array)


def bucket(size: int, per_doubling: int = 1) -> int:
    """The smallest size of a ladder that holds `size`, at least 1.

    With one size per doubling the ladder is 1, 2, 4, 8, ...; with a power of two of them, that many evenly spaced ones
    in each doubling.
    """
    last = max(size - 1, 0)
    step = max((1 << last.bit_length()) // (2 * per_doubling), 1)
    return (last // step + 1) * step


def ladder(below: int, per_doubling: int) -> Iterator[int]:
    """The sizes of the ladder that are smaller than `below`."""
    size = 1
    while size < below:
        yield size
        size = bucket(size + 1, per_doubling)


def grouped(counts: Sequence[int], placement: Placement) -> Int[np.ndarray, "groups s"]:
    """Counts on the host, those of shards that gather together in a row each."""
    axes = placement.axes(Role.TOKENS)
    apart = [i for i, axis in enumerate(axes) if axis not in placement.scatter_axes]
    together = [i for i, axis in enumerate(axes) if axis in placement.scatter_axes]
    grid = np.asarray(counts).reshape([placement.mesh.shape[axis] for axis in axes])
    return grid.transpose(apart + together).reshape(-1, placement.gather_shards)
