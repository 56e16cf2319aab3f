"""Routed experts, by the loop over experts and over sorted rows, against every expert over all rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Activation, ClampedSwiGLUConfig, SwiGLUConfig, Weighted
from moe_jax.kernels.activation import gated_activation
from moe_jax.kernels.grouped_matmul import LoopGroupedMatmul
from moe_jax.kernels.routed_experts import Assignments, ExpertInputs, ExpertWeights, GatedMLP, expert_loop
from moe_jax.kernels.stacked_weight import StackedWeight

ROWS, EXPERTS, CHOICES, HIDDEN, WIDTH = 24, 4, 3, 8, 6
HELD_ELSEWHERE = EXPERTS
SMALL_BLOCKS = LoopGroupedMatmul(shards=4)
"""Some experts have more rows than a block."""
PLAIN = GatedMLP(SwiGLUConfig(), Weighted.OUTPUT)
CASES = {
    "plain": (PLAIN, False),
    "biased": (GatedMLP(ClampedSwiGLUConfig(7.0, 1.7), Weighted.OUTPUT), True),
    "inputs-weighted": (GatedMLP(SwiGLUConfig(), Weighted.INPUT), True),
}


def choose_experts(spread: str) -> np.ndarray:
    """Experts of each row, all different; `HELD_ELSEWHERE` for experts of other devices."""
    random = np.random.default_rng(0)
    drawn = np.array([random.permutation(EXPERTS + 2)[:CHOICES] for _ in range(ROWS)])
    elsewhere = np.full_like(drawn, HELD_ELSEWHERE)
    first = elsewhere.copy()
    first[:, 1] = 0
    here = np.array([random.permutation(EXPERTS)[:CHOICES] for _ in range(ROWS)])
    return {
        "all here": here,
        "random": np.minimum(drawn, HELD_ELSEWHERE),
        "none here": elsewhere,
        "all to the first": first,
        "one to the last": np.where(np.arange(ROWS * CHOICES).reshape(ROWS, CHOICES) == 5, EXPERTS - 1, elsewhere),
    }[spread]


def draw_inputs(bias: bool) -> tuple[ExpertInputs, StackedWeight, StackedWeight]:
    """Inputs, and the weights of the last of three stacked layers."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    gate_up, down = normal(3, EXPERTS, HIDDEN, 2 * WIDTH), normal(3, EXPERTS, WIDTH, HIDDEN)
    biases = (normal(EXPERTS, 2 * WIDTH), normal(EXPERTS, HIDDEN)) if bias else (None, None)
    parameters = ExpertWeights(gate_up[-1], down[-1], *biases)
    inputs = ExpertInputs(normal(ROWS, HIDDEN), jnp.abs(normal(ROWS, CHOICES)), parameters)
    return inputs, StackedWeight(gate_up, jnp.array(2)), StackedWeight(down, jnp.array(2))


def every_expert(mlp: GatedMLP, inputs: ExpertInputs, experts: np.ndarray) -> jax.Array:
    """Compute every expert over all rows, and add up the rows that chose it."""
    x, weights, parameters = inputs
    total = jnp.zeros_like(x)
    for expert in range(EXPERTS):
        chose = (experts == expert).any(axis=1, keepdims=True)
        weight = jnp.sum(jnp.where(experts == expert, weights, 0), axis=1, keepdims=True)
        before, after = (weight, chose) if mlp.weighted is Weighted.INPUT else (1, weight)
        gates_ups = jnp.where(chose, x, 0) * before @ parameters.gate_up[expert]
        gates_ups += 0 if parameters.gate_up_bias is None else parameters.gate_up_bias[expert]
        out = activated(mlp.activation, gates_ups) @ parameters.down[expert]
        total += (out + (0 if parameters.down_bias is None else parameters.down_bias[expert])) * after
    return total


def activated(activation: Activation, gates_ups: jax.Array) -> jax.Array:
    return gated_activation(activation, *jnp.split(gates_ups, 2, axis=1))


@pytest.mark.parametrize("spread", ["all here", "random", "none here", "all to the first", "one to the last"])
@pytest.mark.parametrize(("mlp", "bias"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_equal_those_of_every_expert_over_all_rows(
    mlp: GatedMLP, bias: bool, spread: str
) -> None:
    """The gradient is that of the sorted form."""
    experts, (inputs, *stacked) = choose_experts(spread), draw_inputs(bias)
    assignments = Assignments.of(jnp.array(experts), EXPERTS)

    def loss(outputs: Any) -> Any:
        return jnp.sum(jnp.sin(outputs)), outputs

    def run(inputs: ExpertInputs) -> Any:
        return loss(expert_loop(mlp, SMALL_BLOCKS, inputs, assignments, *stacked))

    (_, got), got_gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(inputs)
    reference = jax.jit(jax.value_and_grad(lambda inputs: loss(every_expert(mlp, inputs, experts)), has_aux=True))
    (_, expected), expected_gradients = reference(inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), got_gradients, expected_gradients)


def test_rows_without_an_expert_here_are_not_read() -> None:
    experts, (inputs, *stacked) = choose_experts("one to the last"), draw_inputs(bias=False)
    visiting = np.flatnonzero((experts < EXPERTS).any(axis=1))
    x = jnp.full_like(inputs.x, jnp.nan).at[visiting].set(inputs.x[visiting])
    assignments = Assignments.of(jnp.array(experts), EXPERTS)
    got: Any = expert_loop(PLAIN, LoopGroupedMatmul(), inputs._replace(x=x), assignments, *stacked)
    np.testing.assert_allclose(got, every_expert(PLAIN, inputs, experts), rtol=1e-5, atol=1e-4)
