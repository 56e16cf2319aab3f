"""States of recurrent layers: each sequence has its own, carried between segments and steps; pad rows change none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from placements import placement

from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.kernels.recurrent_states import SlotStates, Stateless
from moe_jax.kernels.step import Step
from moe_jax.sharding import Route, Rows, ScatterCombine

SEGMENTS, SLOTS, WIDTH, KERNEL = 5, 4, 2, 3
DECODING, PROMPTS = QueryLayout(2, 1), QueryLayout(3, 2)


def batch() -> ForwardBatch:
    """Segments of a step, and two pad rows.

    Segment 0 decodes position 3 of slot 2; segment 1 has no rows; segments 2 and 3 are positions 0 to 2 of slot 0;
    segment 4 is position 4 of slot 3.
    """
    ints: dict[str, Any] = {
        "tokens": [0] * 7,
        "segments": [0, 2, 2, 3, 4, SEGMENTS, SEGMENTS],
        "positions": [3, 0, 1, 2, 4, 0, 0],
        "starts": [0, 0, 1, 3, 4],
        "lengths": [1, 0, 2, 1, 1],
    }
    arrays: dict[str, Any] = {name: jnp.array(values) for name, values in ints.items()}
    return ForwardBatch(**arrays, tables=(), rows=Rows.full(7), layouts=(DECODING, PROMPTS))


def step(forward_batch: ForwardBatch) -> Step:
    route = Route.whole(ScatterCombine(placement("single")))
    return Step.of(forward_batch, route, jnp.array([2, SLOTS, 0, 0, 3]))


def states() -> SlotStates:
    """States of layer 1 of 2: slot s has the state 100 (s + 1), and the last inputs 10 (s + 1) and 10 (s + 1) + 1."""
    state = jnp.zeros((2, 1, SLOTS)).at[1, 0].set(100.0 * (1 + jnp.arange(SLOTS)))
    recent = 10.0 * (1 + jnp.arange(SLOTS))[:, None] + jnp.arange(KERNEL - 1)
    return SlotStates((jnp.zeros((2, 1, SLOTS, KERNEL - 1)).at[1, 0].set(recent),), state)


ROWS = jnp.array([1.0, 2, 3, 4, 5, jnp.nan, jnp.nan])[:, None]
LAYER = jnp.array(1)


def adding(segments: Any, state: Any) -> tuple[Any, Any]:
    """Add up rows: the state is the sum of all, and each row's output the sum up to it."""
    sums = state[:, None] + jnp.cumsum(segments, axis=1)
    return sums, sums[:, -1]


def recall(states: SlotStates | Stateless, rows: jax.Array, forward_batch: ForwardBatch) -> Any:
    return jax.jit(lambda: states.recall(LAYER, 0, rows, KERNEL, step(forward_batch)))()


def advance(states: SlotStates | Stateless, rows: jax.Array, forward_batch: ForwardBatch) -> Any:
    return jax.jit(lambda: states.advance(LAYER, rows, (1,), step(forward_batch), adding))()


def test_rows_find_the_inputs_before_them() -> None:
    found, after = recall(states(), ROWS, batch())
    assert found[:5, 0].tolist() == [[30, 31, 1], [0, 0, 2], [0, 2, 3], [2, 3, 4], [40, 41, 5]]
    assert after.recent[0][1, 0].tolist() == [[3, 4], [20, 21], [31, 1], [41, 5]]
    assert not after.recent[0][0].any()


def test_a_state_is_carried_between_segments_and_stays_in_its_slot() -> None:
    """Slot 0 begins with zeros, whatever it held; slot 1 has no rows."""
    output, after = advance(states(), ROWS, batch())
    assert output[:5, 0].tolist() == [301, 2, 5, 9, 405]
    assert after.state[1, 0].tolist() == [9, 200, 301, 405]
    assert not after.state[0].any()


def test_sequences_that_have_ended_change_nothing() -> None:
    """The loop over decode steps puts their rows outside all segments."""
    forward_batch = replace(batch(), segments=batch().segments.at[0].set(SEGMENTS))
    _, after_recall = recall(states(), ROWS, forward_batch)
    _, after_advance = advance(states(), ROWS, forward_batch)
    assert after_recall.recent[0][1, 0, 2].tolist() == [30, 31]
    assert after_advance.state[1, 0, 2] == 300


def test_without_states_each_segment_is_a_sequence() -> None:
    """Long segments are computed in chunks."""
    length = 150
    ints: dict[str, Any] = {
        "tokens": jnp.zeros(2 * length, int),
        "segments": jnp.repeat(jnp.arange(2), length),
        "positions": jnp.tile(jnp.arange(length), 2),
        "starts": jnp.array([0, length]),
        "lengths": jnp.array([length, length]),
    }
    forward_batch = ForwardBatch(**ints, tables=(), rows=Rows.full(2 * length), layouts=(QueryLayout(2, length),))
    rows = jnp.asarray(np.random.default_rng(0).integers(9, size=(2 * length, 1)), jnp.float32)
    output, _ = advance(Stateless(), rows, forward_batch)
    np.testing.assert_array_equal(output.reshape(2, length), np.cumsum(rows.reshape(2, length), axis=1))
    found, _ = recall(Stateless(), rows, forward_batch)
    assert found[length, 0].tolist() == [0, 0, rows[length, 0]]
    assert found[length - 1, 0].tolist() == rows[length - 3 : length, 0].tolist()
