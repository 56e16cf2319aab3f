"""The loop over blocks of rows of one expert, beside a plain loop over experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Activation, ClampedSwiGLUConfig, SwiGLUConfig, Weighted
from moe_jax.kernels.activation import gated
from moe_jax.kernels.expert_loop import Assignments, ExpertInputs, ExpertLoop, ExpertWeights, expert_loop
from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.layers.experts import sorted_experts

ROWS, EXPERTS, CHOICES, HIDDEN, WIDTH = 24, 4, 3, 8, 6
HELD_ELSEWHERE = EXPERTS
SMALL_BLOCKS = LoopGroupedMatmul(expected=4)
"""So that some experts have more rows than a block."""
KINDS = [
    (SwiGLUConfig(), Weighted.OUTPUT, False),
    (ClampedSwiGLUConfig(7.0, 1.7), Weighted.OUTPUT, True),
    (SwiGLUConfig(), Weighted.INPUT, True),
]


def chosen(how: str) -> np.ndarray:
    """The experts of each row, all different."""
    random = np.random.default_rng(0)
    drawn = np.array([random.permutation(EXPERTS + 2)[:CHOICES] for _ in range(ROWS)])
    elsewhere = np.full_like(drawn, HELD_ELSEWHERE)
    first = elsewhere.copy()
    first[:, 1] = 0
    here = np.array([random.permutation(EXPERTS)[:CHOICES] for _ in range(ROWS)])
    return {
        "all here": here,
        "by chance": np.minimum(drawn, HELD_ELSEWHERE),
        "none here": elsewhere,
        "all to the first": first,
        "one to the last": np.where(np.arange(ROWS * CHOICES).reshape(ROWS, CHOICES) == 5, EXPERTS - 1, elsewhere),
    }[how]


def drawn(bias: bool) -> tuple[ExpertInputs, StackedWeight, StackedWeight]:
    """Of the last of three layers."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    gate_up, down = normal(3, EXPERTS, HIDDEN, 2 * WIDTH), normal(3, EXPERTS, WIDTH, HIDDEN)
    biases = (normal(EXPERTS, 2 * WIDTH), normal(EXPERTS, HIDDEN)) if bias else (None, None)
    held = ExpertWeights(gate_up[-1], down[-1], *biases)
    inputs = ExpertInputs(normal(ROWS, HIDDEN), jnp.abs(normal(ROWS, CHOICES)), held)
    return inputs, StackedWeight(gate_up, jnp.array(2)), StackedWeight(down, jnp.array(2))


def assignments(experts: np.ndarray) -> Assignments:
    order = np.argsort(experts.reshape(-1), kind="stable").astype(np.int32)
    sizes = np.bincount(experts.reshape(-1), minlength=EXPERTS + 1)[:-1]
    return Assignments(jnp.array(order), jnp.array(sizes, jnp.int32), jnp.array(experts < EXPERTS))


def plain(inputs: ExpertInputs, experts: np.ndarray, activation: Activation, weighted: Weighted) -> jax.Array:
    """Every expert over all rows, of which those count that chose it."""
    x, weights, held = inputs
    total = jnp.zeros_like(x)
    for expert in range(EXPERTS):
        chose = (experts == expert).any(axis=1, keepdims=True)
        weight = jnp.sum(jnp.where(experts == expert, weights, 0), axis=1, keepdims=True)
        before, after = (weight, chose) if weighted is Weighted.INPUT else (1, weight)
        gates_ups = jnp.where(chose, x, 0) * before @ held.gate_up[expert]
        gates_ups += 0 if held.gate_up_bias is None else held.gate_up_bias[expert]
        out = gated(activation, *jnp.split(gates_ups, 2, axis=1)) @ held.down[expert]
        total += (out + (0 if held.down_bias is None else held.down_bias[expert])) * after
    return total


@pytest.mark.parametrize("how", ["all here", "by chance", "none here", "all to the first", "one to the last"])
@pytest.mark.parametrize(("activation", "weighted", "bias"), KINDS, ids=["plain", "biased", "inputs-weighted"])
def test_outputs_and_gradients_are_those_of_a_plain_loop(
    activation: Activation, weighted: Weighted, bias: bool, how: str
) -> None:
    experts, (inputs, *stacked) = chosen(how), drawn(bias)
    loop = ExpertLoop(
        activation, weighted, SMALL_BLOCKS, partial(sorted_experts, LoopGroupedMatmul(), activation, weighted)
    )
    which = assignments(experts)

    def loss(outputs: Any) -> Any:
        return jnp.sum(jnp.sin(outputs)), outputs

    walked = jax.jit(jax.value_and_grad(lambda i: loss(expert_loop(loop, i, which, *stacked)), has_aux=True))
    expected = jax.jit(jax.value_and_grad(lambda i: loss(plain(i, experts, activation, weighted)), has_aux=True))
    (_, got), got_gradients = walked(inputs)
    (_, wanted), wanted_gradients = expected(inputs)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got_gradients, wanted_gradients)


def test_rows_that_no_expert_here_has_are_not_looked_at() -> None:
    experts, (inputs, *stacked) = chosen("one to the last"), drawn(bias=False)
    loop = ExpertLoop(
        SwiGLUConfig(),
        Weighted.OUTPUT,
        LoopGroupedMatmul(),
        partial(sorted_experts, LoopGroupedMatmul(), SwiGLUConfig(), Weighted.OUTPUT),
    )
    there = np.flatnonzero((experts < EXPERTS).any(axis=1))
    x = jnp.full_like(inputs.x, jnp.nan).at[there].set(inputs.x[there])
    got = expert_loop(loop, inputs._replace(x=x), assignments(experts), *stacked)
    wanted = plain(inputs, experts, SwiGLUConfig(), Weighted.OUTPUT)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)
