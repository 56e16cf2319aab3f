"""The routed experts that this device holds.

N  gathered rows     k  experts per row     M = N*k  assignments     D  hidden
E  experts held here     F  this device's part of their width
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import Activation, MoEConfig, Weighted
from moe_jax.kernels.activation import gated
from moe_jax.kernels.expert_loop import Assignments, ExpertInputs, ExpertLoop, ExpertWeights, expert_loop
from moe_jax.kernels.grouped_matmul.dispatch import GroupedMatmul, grouped_matmul, grouped_matmul_on
from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.layers import parameter
from moe_jax.layers.parameter import once
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.collectives import argsort


class Experts(nnx.Module):
    """Gated experts over rows sorted by expert. Every assignment to an expert held here is computed; none is
    dropped."""

    def __init__(self, config: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        experts, width = config.experts, config.width
        self.gate_up = parameter.matrix(
            rngs, (experts, hidden, 2, width), (Role.EXPERTS, None, None, Role.FFN), inputs=(1,), dtype=dtype
        )
        self.down = parameter.matrix(
            rngs, (experts, width, hidden), (Role.EXPERTS, Role.FFN, None), inputs=(1,), dtype=dtype
        )
        self.activation, self.weighted = config.activation, config.weighted
        of_width, of_hidden = (Role.EXPERTS, None, Role.FFN), (Role.EXPERTS, None)
        self.gate_up_bias = parameter.zeros((experts, 2, width), of_width, dtype=dtype) if config.bias else None
        self.down_bias = parameter.zeros((experts, hidden), of_hidden, dtype=dtype) if config.bias else None

    @property
    def held(self) -> int:
        """How many of the experts this device holds."""
        return self.gate_up.shape[0]

    def __call__(
        self,
        x: Float[Array, "N D"],
        experts: Int32[Array, "N k"],
        weights: Float[Array, "N k"],
        placement: Placement,
    ) -> Float[Array, "N D"]:
        """The outputs of the experts held here, weighted, summed per row: this device's part of the output."""
        local = experts - placement.index(Role.EXPERTS) * self.held
        here = (local >= 0) & (local < self.held)
        assignments = jnp.where(here, local, self.held).reshape(-1)
        sizes = jnp.bincount(assignments, length=self.held + 1)[:-1]
        inputs = ExpertInputs(x, weights, self._parameters(placement))
        backend = grouped_matmul_on(placement.device, placement.size(Role.EXPERTS))
        over_sorted = partial(sorted_experts, backend, self.activation, self.weighted)
        gate_up, down = parameter.stacked(self.gate_up), parameter.stacked(self.down)
        stacked = gate_up.reshape(*inputs.held.gate_up.shape), down
        with jax.named_scope("grouped_gated_mlp"):
            which = Assignments(argsort(assignments), sizes, here)
            if not isinstance(backend, LoopGroupedMatmul):
                return over_sorted(inputs, which, stacked)
            loop = ExpertLoop(self.activation, self.weighted, backend, over_sorted)
            return expert_loop(loop, inputs, which, *stacked)

    def _parameters(self, placement: Placement) -> ExpertWeights:
        gate_up, down_bias = self.gate_up[...], self.down_bias
        return ExpertWeights(
            gate_up.reshape(*gate_up.shape[:2], -1),
            self.down[...],
            None if self.gate_up_bias is None else self.gate_up_bias[...].reshape(self.held, -1),
            None if down_bias is None else once(down_bias[...], placement, Role.FFN),
        )


def sorted_experts(
    backend: GroupedMatmul,
    activation: Activation,
    weighted: Weighted,
    inputs: ExpertInputs,
    assignments: Assignments,
    stacked: tuple[StackedWeight, StackedWeight] | tuple[None, None] = (None, None),
) -> Float[Array, "N D"]:
    """All rows of an expert at once, by grouped matmuls of gates and ups, and of outputs."""
    (x, weights, held), (order, sizes, here), (gate_up, down) = inputs, assignments, stacked
    rows = x[order // here.shape[1]]
    if weighted is Weighted.INPUT:
        rows *= weights.reshape(-1)[order, None].astype(x.dtype)
        weights = jnp.ones_like(weights)
    expert = jnp.sum(jnp.cumsum(sizes) <= jnp.arange(order.size)[:, None], axis=1)
    gates_ups = grouped_matmul(rows, held.gate_up, sizes, backend, gate_up)
    if held.gate_up_bias is not None:
        gates_ups += held.gate_up_bias.at[expert].get(mode="clip")
    out = grouped_matmul(gated(activation, *jnp.split(gates_ups, 2, axis=1)), held.down, sizes, backend, down)
    if held.down_bias is not None:
        out += held.down_bias.at[expert].get(mode="clip")

    places = jnp.arange(order.size, dtype=jnp.int32)
    place = jnp.zeros_like(order).at[order].set(places, unique_indices=True).reshape(here.shape)
    y = jnp.zeros(x.shape, jnp.float32)
    for choice in range(here.shape[1]):
        weighted_out = out[place[:, choice]] * weights[:, choice, None]
        y += jnp.where(here[:, choice, None], weighted_out, 0)
    return y.astype(x.dtype)
