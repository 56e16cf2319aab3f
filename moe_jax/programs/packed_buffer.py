"""Small host arrays packed into two device arrays, since the host's cost of a transfer is per array, not per byte.

W  words of a token shard     V  words that are the same on every device
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.sharding.rows import on_host


class PackedArray(NamedTuple):
    """Place and type of one packed array, as a token shard sees it."""

    split: bool
    """True if each token shard has its own part; False if the array is the same on every device."""
    start: int
    """First word of the array in its buffer, `split` or `same`."""
    shape: tuple[int, ...]
    dtype: np.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBuffer:
    """Tree of arrays, packed into two arrays of 32-bit words. The elements are booleans or have four bytes."""

    split: Int32[Array, "shards*W"]
    same: Int32[Array, "V"]
    tree: Any = field(metadata={"static": True})
    arrays: tuple[PackedArray, ...] = field(metadata={"static": True})

    @classmethod
    def pack(cls, contents: Any, split: Any, shards: int) -> PackedBuffer:
        """Pack a tree of NumPy arrays.

        Args:
          contents: tree of arrays.
          split: tree of booleans: True if an array is split over the token shards on its leading dimension.
          shards: number of token shards.
        """
        leaves, tree = jax.tree.flatten(contents)
        words: dict[bool, list[np.ndarray]] = {True: [], False: []}
        ends, arrays = {True: 0, False: 0}, []
        for leaf, is_split in zip(leaves, jax.tree.leaves(split), strict=True):
            parts = shards if is_split else 1
            part = (leaf.astype(np.int32) if leaf.dtype == bool else leaf.view(np.int32)).reshape(parts, -1)
            words[is_split].append(part)
            shape = (leaf.shape[0] // parts, *leaf.shape[1:])
            arrays.append(PackedArray(is_split, ends[is_split], shape, leaf.dtype))
            ends[is_split] += part.shape[1]
        buffers = (on_host(np.concatenate(words[is_split], axis=1).reshape(-1)) for is_split in (True, False))
        return cls(*buffers, tree=tree, arrays=tuple(arrays))

    def map(self, function: Callable[[Any, Any], Any], split: Any, same: Any) -> PackedBuffer:
        """Apply `function` to both buffers, each with its own argument."""
        return replace(self, split=function(self.split, split), same=function(self.same, same))

    def unpack(self) -> Any:
        """Rebuild the tree inside a compiled program, on a device of a token shard."""
        return jax.tree.unflatten(self.tree, map(self._array, self.arrays))

    def _array(self, array: PackedArray) -> Array:
        words = (self.split if array.split else self.same)[array.start : array.start + math.prod(array.shape)]
        return (words != 0 if array.dtype == bool else words.view(array.dtype)).reshape(array.shape)
