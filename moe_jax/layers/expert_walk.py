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
from moe_jax.layers.activation import gated
from moe_jax.layers.grouped_walk import Walk, visit_blocks
from moe_jax.layers.parameter import InPlace
from moe_jax.sharding.collectives import vary_alike


class Held(NamedTuple):
    """The parameters of the experts held here."""

    gate_up: Float[Array, "E D 2F"]
    down: Float[Array, "E F D"]
    gate_up_bias: Float[Array, "E 2F"] | None
    down_bias: Float[Array, "E D"] | None


class Assigned(NamedTuple):
    """Which rows go to which of them."""

    order: Int32[Array, "M"]
    """Assignments by expert, those to experts held elsewhere last; assignment a is choice a % k of row a // k."""
    sizes: Int32[Array, "E"]
    here: Bool[Array, "N k"]


class Inputs(NamedTuple):
    """What outputs can be differentiated in."""

    x: Float[Array, "N D"]
    weights: Float[Array, "N k"]
    held: Held


SortedForm = Callable[[Inputs, Assigned], Float[Array, "N D"]]


class Walker(NamedTuple):
    """What is known when a program is traced."""

    activation: Activation
    weighted: Weighted
    by: Walk
    sorted_form: SortedForm
    """The same function, over rows sorted by expert: what gradients are taken of."""


def walk_experts(
    walker: Walker, inputs: Inputs, assigned: Assigned, gate_up: InPlace, down: InPlace
) -> Float[Array, "N D"]:
    """Rows of experts held elsewhere, and pad rows, cost nothing; an expert's weights are read where they lie in the
    stack of layers, when it has rows."""
    return _walk(walker, inputs, assigned, gate_up, down)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(walker: Walker, inputs: Inputs, assigned: Assigned, gate_up: InPlace, down: InPlace) -> Array:
    x, weights, held = inputs
    (rows, k), (order, sizes, _) = weights.shape, assigned
    block = min(walker.by.block_size(rows * k, len(sizes)), rows)

    def part(expert: Array) -> Held:
        biases = (None if bias is None else bias[expert] for bias in held[2:])
        return Held(gate_up.part(expert), down.part(expert), *biases)

    def visit(held: Held, first: Array, own: Array, y: Array) -> Array:
        assignments = lax.dynamic_slice_in_dim(order, first, block)
        row, weight = assignments // k, weights.reshape(-1)[assignments, None]
        chosen = x[row]
        if walker.weighted is Weighted.INPUT:
            chosen, weight = chosen * weight.astype(x.dtype), jnp.ones_like(weight)
        gates_ups = chosen @ held.gate_up
        if held.gate_up_bias is not None:
            gates_ups += held.gate_up_bias
        out = gated(walker.activation, *jnp.split(gates_ups, 2, axis=1)) @ held.down
        if held.down_bias is not None:
            out += held.down_bias
        return y.at[row].add(jnp.where(own[:, None], out * weight, 0))

    y, *_ = vary_alike(jnp.zeros(x.shape, jnp.float32), x, weights, sizes, held.gate_up)
    return visit_blocks(sizes, block, rows * k, part, visit, y).astype(x.dtype)


def _forward(walker: Walker, *args: Any) -> tuple[Array, tuple[Inputs, Assigned]]:
    return _walk(walker, *args), args[:2]


def _backward(walker: Walker, saved: tuple[Inputs, Assigned], grad: Array) -> tuple[Any, ...]:
    inputs, assigned = saved
    _, gradients = jax.vjp(lambda inputs: walker.sorted_form(inputs, assigned), inputs)
    return *gradients(grad), None, None, None


_walk.defvjp(_forward, _backward)
