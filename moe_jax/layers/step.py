"""What one forward pass knows besides its rows' values: which row is which token of which sequence.

T  rows of a token shard     S  sequence slots of a token shard     C  the most rows any slot has in this step
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from moe_jax.sharding import Combine, Residual, Route, Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packing:
    """The rows of a shard, sequence after sequence, as parts of the sequences that its slots hold.

    Every array is per token shard; the shards' arrays follow each other on the leading dimension.
    """

    slots: Int32[Array, "T"]
    """The slot of each row; pad rows say S, which no slot has, so that nothing is written for them."""
    positions: Int32[Array, "T"]
    """The position of each row in its sequence."""
    starts: Int32[Array, "S"]
    """The first row of each slot; anything for a slot without rows in this step."""
    lengths: Int32[Array, "S"]
    """How many rows each slot has in this step."""
    chunk: int = field(metadata={"static": True})
    """C, at least the largest length."""

    def to_grid(self, rows: Shaped[Array, "T ..."]) -> Shaped[Array, "S C ..."]:
        """Rows laid out by slot; grid places beyond a slot's length hold rows of others, to be ignored."""
        return rows.at[self.starts[:, None] + jnp.arange(self.chunk)].get(mode="clip")

    def to_rows(self, grid: Shaped[Array, "S C ..."]) -> Shaped[Array, "T ..."]:
        """The inverse of `to_grid` for real rows; pad rows repeat some other row."""
        slots = jnp.minimum(self.slots, self.starts.shape[0] - 1)
        return grid[slots, jnp.clip(jnp.arange(self.slots.shape[0]) - self.starts[slots], 0, self.chunk - 1)]

    @property
    def last(self) -> Int32[Array, "S"]:
        """The last row of each slot."""
        return jnp.clip(self.starts + self.lengths - 1, 0, self.slots.shape[0] - 1)


@dataclass(frozen=True)
class Step:
    """One forward pass: its rows, their places in sequences, and how they go through a layer."""

    packing: Packing
    rows: Rows
    """Those that this device keeps between blocks."""
    residual: Residual
    combine: Combine

    @classmethod
    def of(cls, rows: Rows, packing: Packing, route: Route) -> Step:
        """Of the rows of a token shard."""
        return cls(packing, route.residual.rows(rows), route.residual, route.combine)

    @property
    def capacity(self) -> int:
        """T."""
        return self.packing.slots.shape[0]
