"""Routed experts on one device: rows to the weighted sums of their experts' outputs."""
# ruff: noqa: I001  (a line for each name, with what it is)

from moe_jax.kernels.routed_experts.dispatch import routed_experts  # by the implementation for a device
from moe_jax.kernels.routed_experts.loop import expert_loop  # CPU: a loop over blocks of rows
from moe_jax.kernels.routed_experts.gated_mlp import Assignments, ExpertInputs, ExpertWeights  # arguments
from moe_jax.kernels.routed_experts.gated_mlp import GatedMLP  # one expert's outputs
from moe_jax.kernels.routed_experts.sorted import sorted_experts  # GPU, TPU, gradients, and the reference

__all__ = [
    "Assignments",
    "ExpertInputs",
    "ExpertWeights",
    "GatedMLP",
    "expert_loop",
    "routed_experts",
    "sorted_experts",
]
