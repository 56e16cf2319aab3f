"""Recurrences by chunks, against the recurrence position by position in double precision."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.kernels.recurrences import (
    DeltaInputs,
    LinearInputs,
    SelectiveScanInputs,
    alibi_slopes,
    delta_rule,
    linear_attention,
    selective_scan,
)
from moe_jax.sharding.rows import on_host

SEGMENTS, CHUNK, HEADS, KEYS, VALUES = 2, 64, 3, 8, 5
TOLERANCE = 1e-5
"""Relative to the largest number."""


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def assert_close(got: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def delta_rows(decays: int, chunk: int = CHUNK) -> DeltaInputs:
    shape = SEGMENTS, chunk, HEADS
    key = draw(1, *shape, KEYS)
    parts = (
        draw(0, *shape, KEYS),
        key / np.linalg.norm(key, axis=-1, keepdims=True),
        draw(2, *shape, VALUES),
        -np.abs(draw(3, *shape, decays)) * (4 if decays > 1 else 0.1),
        1 / (1 + np.exp(-draw(4, *shape))),
    )
    return DeltaInputs(*map(on_host, parts))


def delta_by_position(rows: DeltaInputs, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recurrence of arXiv:2412.06464, equation 10: decay, then replace the value at the key."""
    query, key, value, log_decay, beta = map(np.asarray, rows)
    state, outputs = state.copy(), np.zeros(value.shape)
    for segment, at, head in np.ndindex(*beta.shape):
        memory = state[segment, head]
        memory *= np.exp(log_decay[segment, at, head])[:, None]
        old = key[segment, at, head] @ memory
        memory += np.outer(key[segment, at, head], beta[segment, at, head] * (value[segment, at, head] - old))
        outputs[segment, at, head] = query[segment, at, head] @ memory
    return outputs, state


def in_single(rows: Any) -> Any:
    return jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), rows)


@pytest.mark.parametrize("decays", [1, KEYS])
@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_the_delta_rule(decays: int, chunk: int) -> None:
    rows, state = delta_rows(decays, chunk), draw(9, SEGMENTS, HEADS, KEYS, VALUES)
    output, after = jax.jit(delta_rule)(in_single(rows), jnp.asarray(state, jnp.float32))
    expected, expected_after = delta_by_position(rows, state)
    assert_close(output, expected)
    assert_close(after, expected_after)


def test_rows_of_zeros_leave_a_state_as_it_is() -> None:
    rows, state = delta_rows(KEYS), jnp.asarray(draw(9, SEGMENTS, HEADS, KEYS, VALUES), jnp.float32)
    _, after = delta_rule(jax.tree.map(lambda part: jnp.zeros_like(part, jnp.float32), rows), state)
    np.testing.assert_array_equal(after, state)


@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_the_selective_scan(chunk: int) -> None:
    """Against arXiv:2312.00752, algorithm 2."""
    shape, rates = (SEGMENTS, chunk), -np.abs(draw(5, HEADS, KEYS))
    parts = draw(0, *shape, HEADS), np.abs(draw(1, *shape, HEADS)), draw(2, *shape, KEYS), draw(3, *shape, KEYS)
    rows, state = SelectiveScanInputs(*map(on_host, parts)), draw(9, SEGMENTS, HEADS, KEYS)
    scan = jax.jit(partial(selective_scan, rates=jnp.asarray(rates, jnp.float32)))
    output, after = scan(in_single(rows), jnp.asarray(state, jnp.float32))
    expected = np.zeros((*shape, HEADS))
    x, dt, b, c = map(np.asarray, rows)
    for segment, at in np.ndindex(*shape):
        step = dt[segment, at, :, None]
        state[segment] = np.exp(step * rates) * state[segment] + step * x[segment, at, :, None] * b[segment, at]
        expected[segment, at] = state[segment] @ c[segment, at]
    assert_close(output, expected)
    assert_close(after, state)
    _, same = scan(jax.tree.map(jnp.zeros_like, in_single(rows)), jnp.asarray(state, jnp.float32))
    np.testing.assert_array_equal(same, jnp.asarray(state, jnp.float32))


@pytest.mark.parametrize("chunk", [1, CHUNK])
def test_linear_attention(chunk: int) -> None:
    """Against arXiv:2401.04658, equation 4."""
    shape = SEGMENTS, chunk, HEADS
    parts = draw(0, *shape, KEYS), draw(1, *shape, KEYS), draw(2, *shape, VALUES), -np.abs(draw(3, *shape))
    rows, state = LinearInputs(*map(on_host, parts)), draw(9, SEGMENTS, HEADS, KEYS, VALUES)
    output, after = jax.jit(linear_attention)(in_single(rows), jnp.asarray(state, jnp.float32))
    expected = np.zeros((*shape, VALUES))
    query, key, value, log_decay = map(np.asarray, rows)
    for segment, at, head in np.ndindex(*shape):
        state[segment, head] *= np.exp(log_decay[segment, at, head])
        state[segment, head] += np.outer(key[segment, at, head], value[segment, at, head])
        expected[segment, at, head] = query[segment, at, head] @ state[segment, head]
    assert_close(output, expected)
    assert_close(after, state)


def test_alibi_slopes_of_a_number_of_heads_that_is_no_power_of_two() -> None:
    np.testing.assert_allclose(alibi_slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
