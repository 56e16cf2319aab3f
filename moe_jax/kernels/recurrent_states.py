"""What recurrent layers remember of each sequence: a state, and the last inputs of short convolutions.

G  stacked layers     H  heads of a device     S  slots of a token shard, each the place of one sequence
T  rows     L  lines of a grid     C  their chunk     k  inputs that a convolution sees, a row's own the last

A sequence begins with nothing, whatever its slot held before. Rows that are no line's, as pad rows and those of lines
that have ended are not, change nothing.
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
LARGEST_CHUNK = 64
"""Positions that a recurrence takes at once: each of them may be held against all others."""

SegmentRows = Any
"""A tree of arrays of `[L, C, ...]`; zeros stand for no row, and must leave a state as it is."""
Recurrence: TypeAlias = Callable[[SegmentRows, Array], tuple[Array, Array]]
"""From rows and the states before them, `[L, H, ...]`, to outputs, `[L, C, H, ...]`, and the states after them."""


class States(Protocol):
    """Lets each row find what came before it in its sequence, and keeps what it leaves."""

    def recall(
        self, layer: Int32[Array, ""], part: int, x: Float[Array, "T H ..."], seen: int, step: Step
    ) -> tuple[Float[Array, "T H k ..."], Self]:
        """The inputs of each row and of the `seen - 1` positions before it, in order; zero before the first position.

        Args:
          part: which of the layer's convolutions they are inputs of.
        """
        ...

    def advance(
        self, layer: Int32[Array, ""], rows: Any, shape: tuple[int, ...], step: Step, recurrence: Recurrence
    ) -> tuple[Float[Array, "T H ..."], Self]:
        """The outputs of all rows.

        Args:
          rows: a tree of arrays of `[T, ...]`.
          shape: `[H, ...]` of a state.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotStates:
    """States in slots, for G layers, updated in place."""

    recent: tuple[Float[Array, "G H S _ ..."], ...]
    """Of each convolution, the last `k - 1` inputs."""
    state: Float[Array, "G H S ..."]

    def recall(
        self, layer: Int32[Array, ""], part: int, x: Float[Array, "T H ..."], seen: int, step: Step
    ) -> tuple[Float[Array, "T H k ..."], SlotStates]:
        held, positions = self.recent[part], step.batch.positions
        nowhere = held.shape[2]
        slots = step.slots.at[step.batch.segments].get(mode="fill", fill_value=nowhere)
        first, slots = vary_alike(jnp.full(nowhere, jnp.iinfo(jnp.int32).max), slots)
        first = first.at[slots].min(positions, mode="drop")  # of each slot's rows in this step
        before = positions - first.at[slots].get(mode="clip")
        found = _recalled(x, before, positions, held.at[layer, :, slots].get(mode="clip"), seen)
        is_last = slots != jnp.roll(slots, -1).at[-1].set(nowhere)
        into = jnp.where(is_last, slots, nowhere)
        held = held.at[layer, :, into].set(found[:, :, 1:].astype(held.dtype), mode="drop")
        return found, replace(self, recent=(*self.recent[:part], held, *self.recent[part + 1 :]))

    def advance(
        self, layer: Int32[Array, ""], rows: Any, shape: tuple[int, ...], step: Step, recurrence: Recurrence
    ) -> tuple[Float[Array, "T H ..."], SlotStates]:
        batch, state, nowhere = step.batch, self.state, self.state.shape[2]
        segment_of_first_row = batch.segments.at[batch.starts].get(mode="clip")
        alive = (batch.lengths > 0) & (segment_of_first_row == jnp.arange(segment_of_first_row.shape[0]))
        slots = jnp.where(alive, step.slots, nowhere)
        begun = batch.positions.at[batch.starts].get(mode="clip") > 0
        outputs = []
        for layout in batch.layouts:
            segments = batch.segments_of(layout)
            into = slots[segments]
            before = masked(state.at[layer, :, into].get(mode="clip"), begun[segments])
            goes_on = into == jnp.roll(into, -1).at[-1].set(nowhere + 1)
            run = _in_parallel if layout.chunk == 1 else _in_order
            output, after = run(recurrence, _laid_out(rows, layout, step), before, goes_on)
            state = state.at[layer, :, jnp.where(goes_on, nowhere, into)].set(after, mode="drop")
            outputs.append(output)
        return batch.to_rows(outputs), replace(self, state=state)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stateless:
    """Only this step's own rows, each line a whole sequence: for training."""

    def recall(
        self, layer: Int32[Array, ""], part: int, x: Float[Array, "T H ..."], seen: int, step: Step
    ) -> tuple[Float[Array, "T H k ..."], Stateless]:
        positions = step.batch.positions
        nothing = jnp.zeros((*x.shape[:2], seen - 1, *x.shape[2:]), x.dtype)
        return _recalled(x, positions, positions, nothing, seen), self

    def advance(
        self, layer: Int32[Array, ""], rows: Any, shape: tuple[int, ...], step: Step, recurrence: Recurrence
    ) -> tuple[Float[Array, "T H ..."], Stateless]:
        outputs = [
            _in_parallel(recurrence, _laid_out(rows, layout, step), jnp.zeros((layout.segments, *shape), STATE_DTYPE))[
                0
            ]
            for layout in step.batch.layouts
        ]
        return step.batch.to_rows(outputs), self


def _recalled(
    x: Float[Array, "T H ..."],
    before: Int32[Array, "T"],
    positions: Int32[Array, "T"],
    kept: Float[Array, "T H _ ..."],
    seen: int,
) -> Float[Array, "T H k ..."]:
    """Each row's inputs, from the rows before it and, further back, from what was kept.

    Args:
      before: how many rows of its sequence stand before each row.
      kept: the inputs of the positions before the first of them.
    """
    found = []
    for back in range(seen - 1, 0, -1):
        at = jnp.clip(seen - 1 + before - back, 0, seen - 2)
        older = kept.at[jnp.arange(x.shape[0]), :, at].get(mode="clip").astype(x.dtype)
        of_step = masked(jnp.roll(x, back, axis=0), before >= back)
        found.append(masked(of_step + masked(older, before < back), positions >= back))
    return jnp.stack([*found, x], axis=2)


def _laid_out(rows: Any, layout: QueryLayout, step: Step) -> SegmentRows:
    """Rows by line, zeros beyond a line's length."""
    batch = step.batch
    real = jnp.arange(layout.chunk) < batch.lengths[batch.segments_of(layout), None]

    def lay(part: Array) -> Array:
        laid = batch.to_padded(part, layout)
        return jnp.where(real.reshape(*real.shape, *(1,) * (laid.ndim - 2)), laid, 0)

    return jax.tree.map(lay, rows)


def _in_parallel(recurrence: Recurrence, segments: SegmentRows, before: Array, _: object = None) -> tuple[Array, Array]:
    """Lines of different sequences; long ones are cut, and their states carried from piece to piece."""
    chunk = jax.tree.leaves(segments)[0].shape[1]
    if chunk <= LARGEST_CHUNK:
        return recurrence(segments, before)
    pieces = -(-chunk // LARGEST_CHUNK)

    def layer_slice(part: Array) -> Array:
        padded = jnp.pad(part, ((0, 0), (0, pieces * LARGEST_CHUNK - chunk), *((0, 0),) * (part.ndim - 2)))
        return jnp.moveaxis(padded.reshape(part.shape[0], pieces, LARGEST_CHUNK, *part.shape[2:]), 1, 0)

    def body(state: Array, piece: SegmentRows) -> tuple[Array, Array]:
        output, state = recurrence(piece, state)
        return state, output

    before, *_ = vary_alike(before, *jax.tree.leaves(segments))
    after, outputs = lax.scan(body, before, jax.tree.map(layer_slice, segments))
    joined = jnp.moveaxis(outputs, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :chunk], after


def _in_order(
    recurrence: Recurrence, segments: SegmentRows, before: Array, goes_on: Bool[Array, "L"]
) -> tuple[Array, Array]:
    """Lines one after the other: where a sequence goes on in the next line, so does its state."""

    def body(carry: tuple[Array, Array], segment: tuple[SegmentRows, Array, Array]) -> tuple[tuple[Array, Array], Any]:
        (last, follows), (rows, before, goes_on) = carry, segment
        one = jax.tree.map(lambda part: part[None], rows)
        output, after = _in_parallel(recurrence, one, jnp.where(follows, last, before)[None])
        return (after[0], goes_on), (output[0], after[0])

    before, *_ = vary_alike(before, *jax.tree.leaves(segments))
    start = before[0], vary_alike(jnp.zeros((), bool), goes_on)[0]
    _, (outputs, after) = lax.scan(body, start, (segments, before, goes_on))
    return outputs, after
