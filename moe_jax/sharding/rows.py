"""Token rows: ragged in truth, rectangular in memory.

T  capacity: rows held by each token shard, real ones first
N  rows of a feed-forward buffer, gathered from s token shards
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from moe_jax.sharding.collectives import axis_index
from moe_jax.sharding.placement import Placement, Role


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """How many of each token shard's `capacity` rows are real. Every device knows all counts, so it can build every
    mask.

    Make it with `Rows.of`, which checks the counts; inside a compiled program they are data and cannot be checked.
    """

    counts: Int32[Array, "shards"]
    """Real rows per token shard, shards in mesh order, the same on every device."""
    capacity: int = field(metadata={"static": True})
    total: int = field(metadata={"static": True})
    """Rows that hold the real rows of any one group of shards that gather together, packed: at least their sum."""

    @classmethod
    def of(
        cls, counts: Sequence[int], placement: Placement, capacity: int | None = None, total: int | None = None
    ) -> Rows:
        """Rows for these counts. Sizes that are not given are taken from the ladder of `bucket`, to compile few
        programs.

        Raises:
          ValueError: not one count per token shard, one below 0 or above `capacity`, or more in a group than `total`.
        """
        array = np.asarray(counts, np.int32)
        shards = placement.size(Role.TOKENS)
        if array.shape != (shards,):
            raise ValueError(f"expected one count for each of {shards} token shards, got {list(counts)}")
        capacity = bucket(int(array.max())) if capacity is None else capacity
        if array.min() < 0 or array.max() > capacity:
            raise ValueError(f"counts must lie between 0 and the capacity {capacity}, got {list(counts)}")
        largest = int(_groups(array, placement).sum(axis=1).max())
        total = min(bucket(largest), capacity * placement.gather_shards) if total is None else total
        if largest > total:
            raise ValueError(f"{largest} rows of shards that gather together exceed the total {total}")
        return cls(on_host(array), capacity, total)

    def valid(self, placement: Placement) -> Bool[Array, "T"]:
        """Which of this shard's own rows are real."""
        return jnp.arange(self.capacity) < self.counts[placement.index(Role.TOKENS)]

    def group_counts(self, placement: Placement) -> Int32[Array, "s"]:
        """The counts of the shards that gather with this one, in gathering order."""
        axes = placement.axes(Role.TOKENS)
        grid = self.counts.reshape([placement.mesh.shape[axis] for axis in axes])
        here = (slice(None) if axis in placement.scatter_axes else axis_index((axis,)) for axis in axes)
        return grid[tuple(here)].reshape(placement.gather_shards)


def on_host(array: np.ndarray) -> Array:
    """A NumPy array, typed as the device array that it becomes when a program takes it."""
    return cast(Array, array)


def bucket(rows: int) -> int:
    """The smallest capacity of the ladder 1, 2, 4, 8, ... that holds `rows`; 1 for none."""
    return 1 << max(rows - 1, 0).bit_length()


def _groups(counts: np.ndarray, placement: Placement) -> np.ndarray:
    """`[groups, s]`: counts of the shards that gather together, a row each."""
    axes = placement.axes(Role.TOKENS)
    apart = [i for i, axis in enumerate(axes) if axis not in placement.scatter_axes]
    together = [i for i, axis in enumerate(axes) if axis in placement.scatter_axes]
    grid = counts.reshape([placement.mesh.shape[axis] for axis in axes])
    return grid.transpose(apart + together).reshape(-1, placement.gather_shards)
