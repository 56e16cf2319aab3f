"""Token rows: a different number of real rows on each token shard, in arrays of equal size.

T  capacity: rows of the array of each token shard, real rows first
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
"""Sizes of row buffers per doubling: at most a sixteenth of a buffer is padding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Number of real rows of each token shard, and the capacity of its array.

    Every device has all counts, so it can build every mask. `Rows.of` checks the counts; inside a compiled program they
    are data and cannot be checked.
    """

    counts: Int32[Array, "shards"] | None
    """Real rows of each token shard, in mesh order, equal on every device; `None` if all rows are always real, so that
    nothing is masked."""
    capacity: int = field(metadata={"static": True})

    @classmethod
    def of(cls, counts: Sequence[int], placement: Placement, capacity: int | None = None) -> Rows:
        """Create rows with these counts.

        Args:
          counts: real rows of each token shard, in mesh order.
          capacity: by default a size from the ladder of `bucket`, so that few programs are compiled.

        Raises:
          ValueError: not one count per token shard, or a count below 0 or above `capacity`.
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
        """Create rows that are all real on every token shard."""
        return cls(None, capacity)

    def head(self, base: int) -> Rows:
        """Return the first `base` rows of each shard."""
        return Rows(None if self.counts is None else jnp.minimum(self.counts, base), base)

    def tail(self, base: int) -> Rows:
        """Return the rows of each shard after the first `base`."""
        return Rows(None if self.counts is None else jnp.maximum(self.counts - base, 0), self.capacity - base)

    def valid(self, placement: Placement) -> Bool[Array, "T"] | None:
        """Return a mask of the real rows of this shard; `None` if all rows are real."""
        if self.counts is None:
            return None
        return jnp.arange(self.capacity) < self.counts[placement.index(Role.TOKENS)]

    def group_counts(self, placement: Placement) -> Int32[Array, "s"]:
        """Return the counts of the shards that gather with this one, in the order of the gather."""
        if self.counts is None:
            return jnp.full(placement.gather_shards, self.capacity, jnp.int32)
        axes = placement.axes(Role.TOKENS)
        by_axis = self.counts.reshape([placement.mesh.shape[axis] for axis in axes])
        group = (slice(None) if axis in placement.scatter_axes else axis_index((axis,)) for axis in axes)
        return by_axis[tuple(group)].reshape(placement.gather_shards)


def masked(values: Array, valid: Bool[Array, "T"] | None) -> Array:
    """Replace rows that are not real by zeros, whatever they contain."""
    return values if valid is None else jnp.where(valid.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)


def on_host(array: np.ndarray) -> Array:
    """Type a NumPy array as the device array that it becomes as an argument of a program."""
    return cast(Array, array)


def bucket(size: int, per_doubling: int = 1) -> int:
    """Round `size` up to the next size of a ladder; at least 1.

    Args:
      per_doubling: sizes between a power of two and the next, evenly spaced; a power of two. The ladder of 1 is 1, 2,
        4, 8, ...
    """
    last = max(size - 1, 0)
    step = max((1 << last.bit_length()) // (2 * per_doubling), 1)
    return (last // step + 1) * step


def ladder(below: int, per_doubling: int) -> Iterator[int]:
    """Iterate over the sizes of the ladder of `bucket` that are smaller than `below`."""
    size = 1
    while size < below:
        yield size
        size = bucket(size + 1, per_doubling)


def counts_by_group(counts: Sequence[int], placement: Placement) -> Int[np.ndarray, "groups s"]:
    """Arrange counts on the host so that each row has the counts of shards that gather together."""
    axes = placement.axes(Role.TOKENS)
    across = [i for i, axis in enumerate(axes) if axis not in placement.scatter_axes]
    within = [i for i, axis in enumerate(axes) if axis in placement.scatter_axes]
    by_axis = np.asarray(counts).reshape([placement.mesh.shape[axis] for axis in axes])
    return by_axis.transpose(across + within).reshape(-1, placement.gather_shards)
