"""Parameters of the routed experts, and their use on the experts that this device holds.

N  gathered rows     k  experts per row     D  hidden     E  experts held here     F  this device's part of their width
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import MoEConfig
from moe_jax.kernels.grouped_matmul import grouped_matmul_on
from moe_jax.kernels.routed_experts import ExpertInputs, ExpertWeights, GatedMLP, routed_experts
from moe_jax.layers import parameter
from moe_jax.layers.parameter import bias_part
from moe_jax.sharding import Placement, Role


class Experts(nnx.Module):
    """Routed gated MLPs. Every assignment to an expert held here is computed; none is dropped."""

    def __init__(self, config: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        experts, width = config.experts, config.width
        self.gate_up = parameter.matrix(
            rngs, (experts, hidden, 2, width), (Role.EXPERTS, None, None, Role.FFN), inputs=(1,), dtype=dtype
        )
        self.down = parameter.matrix(
            rngs, (experts, width, hidden), (Role.EXPERTS, Role.FFN, None), inputs=(1,), dtype=dtype
        )
        self.mlp = GatedMLP(config.activation, config.weighted)
        gate_up_dims, down_dims = (Role.EXPERTS, None, Role.FFN), (Role.EXPERTS, None)
        self.gate_up_bias = parameter.zeros((experts, 2, width), gate_up_dims, dtype=dtype) if config.bias else None
        self.down_bias = parameter.zeros((experts, hidden), down_dims, dtype=dtype) if config.bias else None

    @property
    def num_local_experts(self) -> int:
        """Number of experts that this device holds."""
        return self.gate_up.shape[0]

    def __call__(
        self,
        x: Float[Array, "N D"],
        experts: Int32[Array, "N k"],
        weights: Float[Array, "N k"],
        placement: Placement,
    ) -> Float[Array, "N D"]:
        """Sum the weighted outputs of each row's experts held here: this device's part of the output."""
        inputs = ExpertInputs(x, weights, self._weights(placement))
        gate_up, down = parameter.stacked(self.gate_up), parameter.stacked(self.down)
        backend = grouped_matmul_on(placement.device, placement.size(Role.EXPERTS))
        local = experts - placement.index(Role.EXPERTS) * self.num_local_experts
        with jax.named_scope("grouped_gated_mlp"):
            stacked = gate_up.reshape(*inputs.parameters.gate_up.shape), down
            return routed_experts(self.mlp, backend, inputs, local, *stacked)

    def _weights(self, placement: Placement) -> ExpertWeights:
        gate_up, down_bias = self.gate_up[...], self.down_bias
        return ExpertWeights(
            gate_up.reshape(*gate_up.shape[:2], -1),
            self.down[...],
            None if self.gate_up_bias is None else self.gate_up_bias[...].reshape(self.num_local_experts, -1),
            None if down_bias is None else bias_part(down_bias[...], placement, Role.FFN),
        )
