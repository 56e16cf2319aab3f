"""Routed experts on a CPU: one loop over blocks of rows of one expert, from the rows to their weighted outputs.

N  gathered rows     D  hidden     B  rows of a block
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul, loop_over_blocks
from moe_jax.kernels.routed_experts.gated_mlp import Assignments, ExpertInputs, ExpertWeights, GatedMLP
from moe_jax.kernels.routed_experts.sorted import sorted_experts
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding.collectives import vary_alike


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def expert_loop(
    mlp: GatedMLP,
    backend: LoopGroupedMatmul,
    inputs: ExpertInputs,
    assignments: Assignments,
    gate_up: StackedWeight,
    down: StackedWeight,
) -> Float[Array, "N D"]:
    """Compute one expert after the other. The gradient is that of `sorted_experts`.

    Rows of experts held elsewhere, and pad rows, cost nothing. An expert's weights are read from the stack of layers,
    if it has rows.
    """
    x, weights, parameters = inputs
    (rows, k), (order, sizes, _) = weights.shape, assignments
    block = min(backend.block_size(rows * k, len(sizes)), rows)

    def weights_of(expert: Array) -> ExpertWeights:
        biases = (None if bias is None else bias[expert] for bias in parameters[2:])
        return ExpertWeights(gate_up.group(expert), down.group(expert), *biases)

    def compute(expert: ExpertWeights, first: Array, valid: Array, y: Array) -> Array:
        assigned = lax.dynamic_slice_in_dim(order, first, block)
        row, weight = assigned // k, weights.reshape(-1)[assigned, None]
        out = mlp(x[row], weight, lambda rows: rows @ expert.gate_up, lambda rows: rows @ expert.down, expert[2:])
        return y.at[row].add(jnp.where(valid[:, None], mlp.weigh(out, weight), 0))

    y, *_ = vary_alike(jnp.zeros(x.shape, jnp.float32), x, weights, sizes, parameters.gate_up)
    return loop_over_blocks(sizes, block, rows * k, weights_of, compute, y).astype(x.dtype)


def _forward(mlp: GatedMLP, backend: LoopGroupedMatmul, *args: Any) -> tuple[Array, tuple[ExpertInputs, Assignments]]:
    return expert_loop(mlp, backend, *args), args[:2]


def _backward(
    mlp: GatedMLP, backend: LoopGroupedMatmul, saved: tuple[ExpertInputs, Assignments], grad: Array
) -> tuple[Any, ...]:
    inputs, assignments = saved
    _, gradients = jax.vjp(lambda inputs: sorted_experts(mlp, backend, inputs, assignments), inputs)
    return *gradients(grad), None, None, None


expert_loop.defvjp(_forward, _backward)
