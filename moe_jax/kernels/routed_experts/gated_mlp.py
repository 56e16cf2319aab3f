"""The gated MLP of an expert, and the arguments of routed experts.

N  gathered rows     k  experts per row     M = N*k  assignments     D  hidden
E  experts held here     F  this device's part of their width     B  rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import Activation, Weighted
from moe_jax.kernels.activation import gated_activation
from moe_jax.sharding.collectives import argsort


class ExpertWeights(NamedTuple):
    """Parameters of the experts held here."""

    gate_up: Float[Array, "E D 2F"]
    down: Float[Array, "E F D"]
    gate_up_bias: Float[Array, "E 2F"] | None
    down_bias: Float[Array, "E D"] | None


class Assignments(NamedTuple):
    """Assignments of rows to the experts held here."""

    order: Int32[Array, "M"]
    """Assignments by expert, those to experts held elsewhere last; assignment a is choice a % k of row a // k."""
    sizes: Int32[Array, "E"]
    """Assignments to each expert."""
    here: Bool[Array, "N k"]
    """True for assignments to experts held here."""

    @classmethod
    def of(cls, experts: Int32[Array, "N k"], num_local: int) -> Assignments:
        """Sort assignments by expert. Experts are numbered from the first of the `num_local` ones on this device."""
        here = (experts >= 0) & (experts < num_local)
        local = jnp.where(here, experts, num_local).reshape(-1)
        return cls(argsort(local), jnp.bincount(local, length=num_local + 1)[:-1], here)


class ExpertInputs(NamedTuple):
    """Differentiable arguments of routed experts."""

    x: Float[Array, "N D"]
    weights: Float[Array, "N k"]
    """Router weight of each assignment."""
    parameters: ExpertWeights


@dataclass(frozen=True)
class GatedMLP:
    """An expert: `down(activation(gate(x), up(x)))`, with the router's weight on its input or its output."""

    activation: Activation
    weighted: Weighted

    def __call__(
        self,
        rows: Float[Array, "B D"],
        weights: Float[Array, "B 1"],
        gate_up: Callable[[Float[Array, "B D"]], Float[Array, "B 2F"]],
        down: Callable[[Float[Array, "B F"]], Float[Array, "B D"]],
        biases: tuple[Float[Array, "... 2F"] | None, Float[Array, "... D"] | None],
    ) -> Float[Array, "B D"]:
        """Compute outputs, which `weigh` is still to weigh. `gate_up` and `down` multiply rows with the matrices."""
        gate_up_bias, down_bias = biases
        if self.weighted is Weighted.INPUT:
            rows = rows * weights.astype(rows.dtype)
        gates_ups = gate_up(rows)
        if gate_up_bias is not None:
            gates_ups += gate_up_bias
        out = down(gated_activation(self.activation, *jnp.split(gates_ups, 2, axis=1)))
        return out if down_bias is None else out + down_bias

    def weigh(self, outputs: Float[Array, "B D"], weights: Float[Array, "B 1"]) -> Float[Array, "B D"]:
        """Multiply outputs by the router's weights, unless the inputs were, in the dtype of the weights."""
        return outputs * weights if self.weighted is Weighted.OUTPUT else outputs.astype(weights.dtype)
