"""Many small arrays on their way to the devices as two, for the host's work is the same for each that it sends.

W  words of a token shard     V  words that are the same everywhere
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


class Item(NamedTuple):
    """One of the arrays, as a token shard has it."""

    split: bool
    """Whether each token shard has its own part."""
    start: int
    """Its first word, among those of its kind."""
    shape: tuple[int, ...]
    dtype: np.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parcel:
    """A tree of arrays, of booleans or of four bytes an element."""

    split: Int32[Array, "shards*W"]
    same: Int32[Array, "V"]
    tree: Any = field(metadata={"static": True})
    items: tuple[Item, ...] = field(metadata={"static": True})

    @classmethod
    def wrap(cls, contents: Any, split: Any, shards: int) -> Parcel:
        """
        Args:
          contents: arrays on the host.
          split: a prefix of that tree: whether arrays are split over the token shards, on their leading dimension.
        """
        leaves, tree = jax.tree.flatten(contents)
        kinds = jax.tree.leaves(jax.tree.broadcast(split, contents))
        words: dict[bool, list[np.ndarray]] = {True: [], False: []}
        ends, items = {True: 0, False: 0}, []
        for leaf, kind in zip(leaves, kinds, strict=True):
            parts = shards if kind else 1
            words[kind].append(
                (leaf.astype(np.int32) if leaf.dtype == bool else leaf.view(np.int32)).reshape(parts, -1)
            )
            items.append(Item(kind, ends[kind], (leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype))
            ends[kind] += words[kind][-1].shape[1]
        joined = (on_host(np.concatenate(words[kind], axis=1).reshape(-1)) for kind in (True, False))
        return cls(*joined, tree=tree, items=tuple(items))

    def each(self, change: Callable[[Any, Any], Any], split: Any, same: Any) -> Parcel:
        """With its arrays changed, each by what belongs to it."""
        return replace(self, split=change(self.split, split), same=change(self.same, same))

    def open(self) -> Any:
        """The tree, in a compiled program, on the device of a token shard."""
        return jax.tree.unflatten(self.tree, map(self._array, self.items))

    def _array(self, item: Item) -> Array:
        words = (self.split if item.split else self.same)[item.start : item.start + math.prod(item.shape)]
        return (words != 0 if item.dtype == bool else words.view(item.dtype)).reshape(item.shape)
