"""Routed experts over rows sorted by expert.

N  gathered rows     D  hidden
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.kernels.grouped_matmul.dispatch import GroupedMatmul, grouped_matmul
from moe_jax.kernels.routed_experts.gated_mlp import Assignments, ExpertInputs, GatedMLP
from moe_jax.kernels.stacked_weight import StackedWeight


def sorted_experts(
    mlp: GatedMLP,
    backend: GroupedMatmul,
    inputs: ExpertInputs,
    assignments: Assignments,
    gate_up: StackedWeight | None = None,
    down: StackedWeight | None = None,
) -> Float[Array, "N D"]:
    """Compute all experts at once, by one grouped matmul for gates and ups and one for outputs.

    Args:
      gate_up, down: the same weights in their stack of layers, so that the layer need not be copied out of it.
    """
    (x, weights, parameters), (order, sizes, here) = inputs, assignments
    choices = here.shape[1]
    expert = jnp.sum(jnp.cumsum(sizes) <= jnp.arange(order.size)[:, None], axis=1)
    gate_up_bias, down_bias = (None if bias is None else bias.at[expert].get(mode="clip") for bias in parameters[2:])
    out = mlp(
        x[order // choices],
        weights.reshape(-1)[order, None],
        lambda rows: grouped_matmul(rows, parameters.gate_up, sizes, backend, gate_up),
        lambda rows: grouped_matmul(rows, parameters.down, sizes, backend, down),
        (gate_up_bias, down_bias),
    )

    places = jnp.arange(order.size, dtype=jnp.int32)
    place = jnp.zeros_like(order).at[order].set(places, unique_indices=True).reshape(here.shape)
    y = jnp.zeros(x.shape, jnp.float32)
    for choice in range(choices):
        weighted = mlp.weigh(out[place[:, choice]], weights[:, choice, None])
        y += jnp.where(here[:, choice, None], weighted, 0)
    return y.astype(x.dtype)
