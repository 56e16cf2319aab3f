"""The columns of the vocabulary on one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Shaped

from moe_jax.sharding import Placement, Role
from moe_jax.sharding.collectives import all_gather_same, sum_devices

NO_TOKEN = -1
"""Fills arrays of token ids; no vocabulary has it."""

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary on this device, and the collectives over the devices that share the vocabulary."""

    placement: Placement
    vocab_size: int
    size: int
    """Number of columns on this device, padding included."""
    first: Array | int
    """Token id of the first column."""

    @classmethod
    def of(cls, logits: Float[Array, "Q V"], vocab_size: int, placement: Placement) -> VocabShard:
        size = logits.shape[1]
        return cls(placement, vocab_size, size, placement.index(Role.HEADS) * size)

    def mask_padding(self, logits: Float[Array, "Q V"]) -> Float[Array, "Q V"]:
        """Set columns beyond the vocabulary to minus infinity."""
        if self.size * self.placement.size(Role.HEADS) == self.vocab_size:
            return logits
        return jnp.where(self.first + jnp.arange(self.size) < self.vocab_size, logits, -jnp.inf)

    def mask_token(self, token: int, logits: Float[Array, "Q V"]) -> Float[Array, "Q V"]:
        """Set the column of a token to minus infinity."""
        return jnp.where(self.first + jnp.arange(self.size) == token, -jnp.inf, logits)

    def holds(self, tokens: Int32[Array, "..."]) -> Bool[Array, "..."]:
        return (tokens >= self.first) & (tokens < self.first + self.size)

    def columns(self, tokens: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """Columns of tokens on this device; V, which scatters drop, for tokens of other devices."""
        return jnp.where(self.holds(tokens), tokens - self.first, self.size)

    def all_gather(self, value: Shaped[Array, "..."]) -> Shaped[Array, "h ..."]:
        """Stack the values of all shards: `[...] {V:heads} -> [h, ...]`."""
        return all_gather_same(value[None], self.placement.axes(Role.HEADS))

    def all_reduce(self, tree: Tree) -> Tree:
        """Sum the values of all shards: `[...] {V:heads} -> [...]`."""
        return sum_devices(tree, self.placement.axes(Role.HEADS))

    def argmax(self, logits: Float[Array, "Q V"]) -> tuple[Float[Array, "Q"], Int32[Array, "Q"]]:
        """Highest logit of the whole vocabulary and its token, the lowest id among equals."""
        column = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = self.all_gather(jnp.take_along_axis(logits, column[:, None], axis=-1)[:, 0])
        tokens = self.all_gather(self.first + column)
        device = jnp.argmax(best, axis=0)[None]
        return jnp.take_along_axis(best, device, axis=0)[0], jnp.take_along_axis(tokens, device, axis=0)[0]
