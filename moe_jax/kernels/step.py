"""Context of one forward pass: its batch, and how rows go through a layer.

T  rows of a token shard     L  segments of a token shard     H  heads     d  head width
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.forward_batch import ForwardBatch
from moe_jax.kernels.rope import CosSin, Rotary
from moe_jax.sharding import Combine, ResidualLayout, Route, Rows


@dataclass(frozen=True)
class Step:
    """A forward batch with the residual layout and the combine that its rows take."""

    batch: ForwardBatch
    rows: Rows
    """Rows that this device keeps between blocks."""
    residual: ResidualLayout
    combine: Combine
    slots: Int32[Array, "L"]
    """Slot of each segment's recurrent state; beyond all slots for a segment without rows."""
    rotations: Mapping[Rotary, CosSin] = field(default_factory=dict)
    """Cosines and sines at the rows' positions, for each rotary embedding of the model."""

    @classmethod
    def of(cls, batch: ForwardBatch, route: Route, slots: Int32[Array, "L"] | None = None) -> Step:
        """Make the step of a batch; without `slots`, each segment is a whole sequence."""
        slots = jnp.arange(batch.starts.shape[0]) if slots is None else slots
        return cls(batch, route.residual.rows(batch.rows), route.residual, route.combine, slots)

    def with_rotations(self, rotaries: Iterable[Rotary]) -> Step:
        """Compute each rotary embedding's cosines and sines once, for all layers that share it."""
        return replace(self, rotations={rotary: rotary.at(self.batch.positions) for rotary in rotaries})

    def rotate(self, x: Float[Array, "T H d"], rotary: Rotary) -> Float[Array, "T H d"]:
        """Rotate each row by its position."""
        return rotary(x, self.rotations.get(rotary) or rotary.at(self.batch.positions))

    @property
    def capacity(self) -> int:
        """Rows of a token shard, padding included (T)."""
        return self.batch.capacity
