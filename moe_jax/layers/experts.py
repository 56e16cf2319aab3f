"""The routed experts that this device holds.

N  gathered rows     k  experts per row     M = N*k  assignments     D  hidden
E  experts held here     F  this device's part of their width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import MoEConfig, Weighted
from moe_jax.layers import parameter
from moe_jax.layers.activation import gated
from moe_jax.layers.grouped_matmul import grouped_matmul, products_on
from moe_jax.layers.parameter import once
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.collectives import argsort


class Experts(nnx.Module):
    """Gated experts over rows sorted by expert. Every assignment to an expert held here is computed; none is
    dropped."""

    def __init__(self, config: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        experts, width = config.experts, config.width
        self.gate_up = parameter.normal(
            rngs, (experts, hidden, 2, width), (Role.EXPERTS, None, None, Role.FFN), fan_in=hidden, dtype=dtype
        )
        self.down = parameter.normal(
            rngs, (experts, width, hidden), (Role.EXPERTS, Role.FFN, None), fan_in=width, dtype=dtype
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
        held = self.held
        local = experts - placement.index(Role.EXPERTS) * held
        here = (local >= 0) & (local < held)
        # Assignments sorted by expert, those of other devices last.
        assigned = jnp.where(here, local, held).reshape(-1)
        order = argsort(assigned)
        sizes = jnp.bincount(assigned, length=held + 1)[:-1]

        with jax.named_scope("grouped_gated_mlp"):
            rows = x[order // experts.shape[1]]
            if self.weighted is Weighted.INPUT:
                rows *= weights.reshape(-1)[order, None].astype(x.dtype)
                weights = jnp.ones_like(weights)
            out = self._outputs(rows, assigned[order], sizes, placement)

        places = jnp.arange(order.size, dtype=jnp.int32)
        place = jnp.zeros_like(order).at[order].set(places, unique_indices=True).reshape(experts.shape)
        y = jnp.zeros(x.shape, jnp.float32)
        for choice in range(experts.shape[1]):
            weighted = out[place[:, choice]] * weights[:, choice, None]
            y += jnp.where(here[:, choice, None], weighted, 0)
        return y.astype(x.dtype)

    def _outputs(
        self, rows: Float[Array, "M D"], experts: Int32[Array, "M"], sizes: Int32[Array, "E"], placement: Placement
    ) -> Float[Array, "M D"]:
        """Of rows sorted by expert, each row's; those of other devices' experts may come out as anything."""
        gate_up, down, held = self.gate_up[...], self.down[...], self.held
        by = products_on(placement.device)
        gates_ups = grouped_matmul(rows, gate_up.reshape(*gate_up.shape[:2], -1), sizes, by)
        if self.gate_up_bias is not None:
            gates_ups += self.gate_up_bias[...].reshape(held, -1).at[experts].get(mode="clip")
        gate, up = jnp.split(gates_ups, 2, axis=1)
        out = grouped_matmul(gated(self.activation, gate, up), down, sizes, by)
        if self.down_bias is not None:
            out += once(self.down_bias[...], placement, Role.FFN).at[experts].get(mode="clip")
        return out
