"""Where attention finds keys and values.

L  layers     S  slots of a token shard     K  KV heads of a device     P  positions     d  head width     T  rows
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.layers.step import Packing
from moe_jax.sharding import Role

Heads = Float[Array, "T K d"]
Positions = Float[Array, "S K P d"]


class Cache(Protocol):
    """Takes the keys and values of a step's rows, gives those of every position of every slot."""

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing
    ) -> tuple[Positions, Positions, Self]: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all earlier positions, for `L` stacked layers.

    The order of the dimensions is chosen so that attention's batched matmuls read it as it lies: in others, XLA:GPU
    transposes the whole cache into and out of the loop over layers.
    """

    keys: Float[Array, "L S K P d"]
    values: Float[Array, "L S K P d"]

    DIMS = (None, Role.TOKENS, Role.HEADS, None, None)

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing
    ) -> tuple[Positions, Positions, KVCache]:
        at = (layer, packing.slots, slice(None), packing.positions)
        cache = KVCache(self.keys.at[at].set(keys, mode="drop"), self.values.at[at].set(values, mode="drop"))
        return cache.keys[layer], cache.values[layer], cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uncached:
    """Only this step's own keys and values: for training, where each sequence is whole in one step."""

    positions: int = field(metadata={"static": True})

    def write(
        self, layer: Int32[Array, ""], keys: Heads, values: Heads, packing: Packing
    ) -> tuple[Positions, Positions, Uncached]:
        del layer
        empty = jnp.zeros((packing.starts.shape[0], keys.shape[1], self.positions, keys.shape[2]), keys.dtype)
        at = (packing.slots, slice(None), packing.positions)
        return empty.at[at].set(keys, mode="drop"), empty.at[at].set(values, mode="drop"), self
