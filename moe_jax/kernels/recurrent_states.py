"""Memory of recurrent layers for each sequence: a state, and the last inputs of short convolutions.

G  stacked layers     H  heads of a device     S  slots of a token shard, each the place of one sequence
T  rows     L  segments of a query layout     C  rows of a segment, padding included
k  positions that a convolution sees, a row's own the last

A sequence begins with zeros, whatever its slot held. Rows outside all segments (pad rows, and rows of sequences that
have ended) change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.kernels.step import Step
from moe_jax.sharding.collectives import vary_alike
from moe_jax.sharding.rows import masked

STATE_DTYPE = jnp.float32
MAX_CHUNK = 64
"""Positions that a recurrence computes at once: it may multiply each of them with all others."""

SegmentRows = Any
"""A tree of arrays `[L, C, ...]`. Zeros stand for no row, and must leave a state as it is."""
Recurrence: TypeAlias = Callable[[SegmentRows, Array], tuple[Array, Array]]
"""From rows and the states before them, `[L, H, ...]`, to outputs, `[L, C, H, ...]`, and the states after them."""


class States(Protocol):
    """Give each row what came before it in its sequence, and keep what later steps need."""

    def recall(
        self, layer: Int32[Array, ""], convolution: int, x: Float[Array, "T H ..."], width: int, step: Step
    ) -> tuple[Float[Array, "T H k ..."], Self]:
        """Return the inputs at each row and the `width - 1` positions before it; zero before the first position.

        Args:
          convolution: number of the layer's convolution.
          x: its inputs at this step's rows.
        """
        ...

    def advance(
        self, layer: Int32[Array, ""], rows: Any, shape: tuple[int, ...], step: Step, recurrence: Recurrence
    ) -> tuple[Float[Array, "T H ..."], Self]:
        """Run a recurrence over all rows, and return their outputs.

        Args:
          rows: a tree of arrays `[T, ...]`.
          shape: shape of a state, `[H, ...]`.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotStates:
    """States in slots, for G layers, updated in place."""

    recent: tuple[Float[Array, "G H S _ ..."], ...]
    """Last `k - 1` inputs of each convolution."""
    state: Float[Array, "G H S ..."]

    def recall(
        self, layer: Int32[Array, ""], convolution: int, x: Float[Array, "T H ..."], width: int, step: Step
    ) -> tuple[Float[Array, "T H k ..."], SlotStates]:
        recent, positions = self.recent[convolution], step.batch.positions
        no_slot = recent.shape[2]
        slots = step.slots.at[step.batch.segments].get(mode="fill", fill_value=no_slot)
        first, slots = vary_alike(jnp.full(no_slot, jnp.iinfo(jnp.int32).max), slots)
        first = first.at[slots].min(positions, mode="drop")  # of each slot's rows in this step
        rows_before = positions - first.at[slots].get(mode="clip")
        inputs = _inputs_before(x, rows_before, positions, recent.at[layer, :, slots].get(mode="clip"), width)
        is_last = slots != jnp.roll(slots, -1).at[-1].set(no_slot)
        written = jnp.where(is_last, slots, no_slot)
        recent = recent.at[layer, :, written].set(inputs[:, :, 1:].astype(recent.dtype), mode="drop")
        return inputs, replace(self, recent=(*self.recent[:convolution], recent, *self.recent[convolution + 1 :]))

    def advance(
        self, layer: Int32[Array, ""], rows: Any, shape: tuple[int, ...], step: Step, recurrence: Recurrence
    ) -> tuple[Float[Array, "T H ..."], SlotStates]:
        batch, state, no_slot = step.batch, self.state, self.state.shape[2]
        segment_of_first_row = batch.segments.at[batch.starts].get(mode="clip")
        is_live = (batch.lengths > 0) & (segment_of_first_row == jnp.arange(segment_of_first_row.shape[0]))
        live_slots = jnp.where(is_live, step.slots, no_slot)
        has_state = batch.positions.at[batch.starts].get(mode="clip") > 0
        outputs = []
        for layout in batch.layouts:
            segments = batch.segments_of(layout)
            slots = live_slots[segments]
            before = masked(state.at[layer, :, slots].get(mode="clip"), has_state[segments])
            continues = slots == jnp.roll(slots, -1).at[-1].set(no_slot + 1)
            run = _in_parallel if layout.chunk == 1 else _in_order
            output, after = run(recurrence, _to_padded(rows, layout, step), before, continues)
            state = state.at[layer, :, jnp.where(continues, no_slot, slots)].set(after, mode="drop")
            outputs.append(output)
        return batch.to_rows(outputs), replace(self, state=state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stateless:
    """No memory between steps: each segment is a whole sequence, for training."""

    def recall(
        self, layer: Int32[Array, ""], convolution: int, x: Float[Array, "T H ..."], width: int, step: Step
    ) -> tuple[Float[Array, "T H k ..."], Stateless]:
        positions = step.batch.positions
        recent = jnp.zeros((*x.shape[:2], width - 1, *x.shape[2:]), x.dtype)
        return _inputs_before(x, positions, positions, recent, width), self

    def advance(
        self, layer: Int32[Array, ""], rows: Any, shape: tuple[int, ...], step: Step, recurrence: Recurrence
    ) -> tuple[Float[Array, "T H ..."], Stateless]:
        outputs = []
        for layout in step.batch.layouts:
            before = jnp.zeros((layout.segments, *shape), STATE_DTYPE)
            output, _ = _in_parallel(recurrence, _to_padded(rows, layout, step), before)
            outputs.append(output)
        return step.batch.to_rows(outputs), self


def _inputs_before(
    x: Float[Array, "T H ..."],
    rows_before: Int32[Array, "T"],
    positions: Int32[Array, "T"],
    recent: Float[Array, "T H _ ..."],
    width: int,
) -> Float[Array, "T H k ..."]:
    """Take each row's inputs from the rows before it and, further back, from the recent inputs.

    Args:
      rows_before: rows of each row's sequence that precede it in this step.
      recent: inputs at the positions before each sequence's first row of this step.
    """
    inputs = []
    for back in range(width - 1, 0, -1):
        at = jnp.clip(width - 1 + rows_before - back, 0, width - 2)
        older = recent.at[jnp.arange(x.shape[0]), :, at].get(mode="clip").astype(x.dtype)
        in_step = masked(jnp.roll(x, back, axis=0), rows_before >= back)
        inputs.append(masked(in_step + masked(older, rows_before < back), positions >= back))
    return jnp.stack([*inputs, x], axis=2)


def _to_padded(rows: Any, layout: QueryLayout, step: Step) -> SegmentRows:
    """Lay rows out by segment, with zeros beyond a segment's length."""
    batch = step.batch
    real = jnp.arange(layout.chunk) < batch.lengths[batch.segments_of(layout), None]

    def pad(part: Array) -> Array:
        padded = batch.to_padded(part, layout)
        return jnp.where(real.reshape(*real.shape, *(1,) * (padded.ndim - 2)), padded, 0)

    return jax.tree.map(pad, rows)


def _in_parallel(recurrence: Recurrence, segments: SegmentRows, before: Array, _: object = None) -> tuple[Array, Array]:
    """Run segments of different sequences together. Long segments are cut into chunks, whose states are carried on."""
    length = jax.tree.leaves(segments)[0].shape[1]
    if length <= MAX_CHUNK:
        return recurrence(segments, before)
    chunks = -(-length // MAX_CHUNK)

    def to_chunks(part: Array) -> Array:
        padded = jnp.pad(part, ((0, 0), (0, chunks * MAX_CHUNK - length), *((0, 0),) * (part.ndim - 2)))
        return jnp.moveaxis(padded.reshape(part.shape[0], chunks, MAX_CHUNK, *part.shape[2:]), 1, 0)

    def body(state: Array, chunk: SegmentRows) -> tuple[Array, Array]:
        output, state = recurrence(chunk, state)
        return state, output

    before, *_ = vary_alike(before, *jax.tree.leaves(segments))
    after, outputs = lax.scan(body, before, jax.tree.map(to_chunks, segments))
    joined = jnp.moveaxis(outputs, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length], after


def _in_order(
    recurrence: Recurrence, segments: SegmentRows, before: Array, continues: Bool[Array, "L"]
) -> tuple[Array, Array]:
    """Run segments one after the other. Where the next segment continues a sequence, so does its state."""

    def body(carry: tuple[Array, Array], segment: tuple[SegmentRows, Array, Array]) -> tuple[tuple[Array, Array], Any]:
        (last, follows), (rows, before, continues) = carry, segment
        one = jax.tree.map(lambda part: part[None], rows)
        output, after = _in_parallel(recurrence, one, jnp.where(follows, last, before)[None])
        return (after[0], continues), (output[0], after[0])

    before, *_ = vary_alike(before, *jax.tree.leaves(segments))
    start = before[0], vary_alike(jnp.zeros((), bool), continues)[0]
    _, (outputs, after) = lax.scan(body, start, (segments, before, continues))
    return outputs, after
