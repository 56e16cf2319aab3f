"""Routed experts by the implementation for a device.

N  gathered rows     k  experts per row     D  hidden
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from moe_jax.kernels.grouped_matmul.dispatch import GroupedMatmul
from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul
from moe_jax.kernels.routed_experts.gated_mlp import Assignments, ExpertInputs, GatedMLP
from moe_jax.kernels.routed_experts.loop import expert_loop
from moe_jax.kernels.routed_experts.sorted import sorted_experts
from moe_jax.kernels.stacked_weight import StackedWeight


def routed_experts(
    mlp: GatedMLP,
    backend: GroupedMatmul,
    inputs: ExpertInputs,
    experts: Int32[Array, "N k"],
    gate_up: StackedWeight,
    down: StackedWeight,
) -> Float[Array, "N D"]:
    """Sum the weighted outputs of each row's experts held here. No assignment is dropped. Differentiable in `inputs`.

    Args:
      mlp: an expert.
      backend: implementation of the grouped matmuls, as `grouped_matmul_on` chooses it.
      experts: experts of each row, numbered from the first one on this device; others are held elsewhere.
      gate_up, down: the weights in their stacks of layers, from which they are read.
    """
    assignments = Assignments.of(experts, inputs.parameters.down.shape[0])
    if isinstance(backend, LoopGroupedMatmul):
        return expert_loop(mlp, backend, inputs, assignments, gate_up, down)
    return sorted_experts(mlp, backend, inputs, assignments, gate_up, down)
