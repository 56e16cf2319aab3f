"""Routed experts on a CPU: one loop over blocks of rows of one expert, from the rows to their weighted outputs.

N  gathered rows     k  experts per row     M = N*k  assignments     D  hidden
E  experts held here     F  this device's part of their width     B  rows of a block
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import Activation, Weighted
from moe_jax.kernels.activation import gated
from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul, visit_blocks
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding.collectives import vary_alike


class ExpertWeights(NamedTuple):
    """The parameters of the experts held here."""

    gate_up: Float[Array, "E D 2F"]
    down: Float[Array, "E F D"]
    gate_up_bias: Float[Array, "E 2F"] | None
    down_bias: Float[Array, "E D"] | None


class Assignments(NamedTuple):
    """Which rows go to which of them."""

    order: Int32[Array, "M"]
    """Assignments by expert, those to experts held elsewhere last; assignment a is choice a % k of row a // k."""
    sizes: Int32[Array, "E"]
    here: Bool[Array, "N k"]


class ExpertInputs(NamedTuple):
    """What outputs can be differentiated in."""

    x: Float[Array, "N D"]
    weights: Float[Array, "N k"]
    held: ExpertWeights


SortedExperts = Callable[[ExpertInputs, Assignments], Float[Array, "N D"]]


class ExpertLoop(NamedTuple):
    """What is known when a program is traced."""

    activation: Activation
    weighted: Weighted
    backend: LoopGroupedMatmul
    sorted_experts: SortedExperts
    """The same function, over rows sorted by expert: what gradients are taken of."""


def expert_loop(
    loop: ExpertLoop, inputs: ExpertInputs, assignments: Assignments, gate_up: StackedWeight, down: StackedWeight
) -> Float[Array, "N D"]:
    """Rows of experts held elsewhere, and pad rows, cost nothing; an expert's weights are read where they lie in the
    stack of layers, when it has rows."""
    return _walk(loop, inputs, assignments, gate_up, down)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(
    loop: ExpertLoop, inputs: ExpertInputs, assignments: Assignments, gate_up: StackedWeight, down: StackedWeight
) -> Array:
    x, weights, held = inputs
    (rows, k), (order, sizes, _) = weights.shape, assignments
    block = min(loop.backend.block_size(rows * k, len(sizes)), rows)

    def part(expert: Array) -> ExpertWeights:
        biases = (None if bias is None else bias[expert] for bias in held[2:])
        return ExpertWeights(gate_up.part(expert), down.part(expert), *biases)

    def visit(held: ExpertWeights, first: Array, own: Array, y: Array) -> Array:
        assignments = lax.dynamic_slice_in_dim(order, first, block)
        row, weight = assignments // k, weights.reshape(-1)[assignments, None]
        chosen = x[row]
        if loop.weighted is Weighted.INPUT:
            chosen, weight = chosen * weight.astype(x.dtype), jnp.ones_like(weight)
        gates_ups = chosen @ held.gate_up
        if held.gate_up_bias is not None:
            gates_ups += held.gate_up_bias
        out = gated(loop.activation, *jnp.split(gates_ups, 2, axis=1)) @ held.down
        if held.down_bias is not None:
            out += held.down_bias
        return y.at[row].add(jnp.where(own[:, None], out * weight, 0))

    y, *_ = vary_alike(jnp.zeros(x.shape, jnp.float32), x, weights, sizes, held.gate_up)
    return visit_blocks(sizes, block, rows * k, part, visit, y).astype(x.dtype)


def _forward(loop: ExpertLoop, *args: Any) -> tuple[Array, tuple[ExpertInputs, Assignments]]:
    return _walk(loop, *args), args[:2]


def _backward(loop: ExpertLoop, saved: tuple[ExpertInputs, Assignments], grad: Array) -> tuple[Any, ...]:
    inputs, assignments = saved
    _, gradients = jax.vjp(lambda inputs: loop.sorted_experts(inputs, assignments), inputs)
    return *gradients(grad), None, None, None


_walk.defvjp(_forward, _backward)
