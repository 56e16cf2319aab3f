"""Which experts each row visits, and with what weight.

T  own rows     D  hidden     E  experts     k  experts per row
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.kernels.routing import SparseMixer, TopKRouting
from moe_jax.layers import parameter
from moe_jax.sharding.rows import masked


class Load(NamedTuple):
    """How a shard's real rows spread over the experts: sums over rows, for the balancing loss."""

    assignments: Float[Array, "E"]
    """How often each expert was chosen."""
    probabilities: Float[Array, "E"]
    """The sum of each expert's scores."""


class Routing(NamedTuple):
    experts: Int32[Array, "T k"]
    """The chosen experts; E, which is none, for pad rows."""
    weights: Float[Array, "T k"]
    load: Load


class Router(nnx.Module):
    """A logit for each expert, from which the config's way to choose takes the best; float32 throughout."""

    def __init__(self, config: MoEConfig, hidden: int, *, rngs: nnx.Rngs) -> None:
        experts, router = config.experts, config.router
        scored = isinstance(router, RouterConfig)
        self.experts = experts
        self.weight = parameter.normal(rngs, (hidden, experts), (None, None), fan_in=hidden, dtype=jnp.float32)
        self.bias = parameter.zeros((experts,), (None,), dtype=jnp.float32) if scored and router.bias else None
        self.selection_bias = (
            parameter.zeros((experts,), (None,), dtype=jnp.float32) if scored and router.selection_bias else None
        )
        self.choice = TopKRouting(router, config.top_k) if scored else SparseMixer(router, config.top_k)

    def __call__(self, x: Float[Array, "T D"], valid: Bool[Array, "T"] | None) -> Routing:
        logits = x.astype(jnp.float32) @ self.weight[...]
        if self.bias is not None:
            logits += self.bias[...]
        chosen = self.choice(logits, None if self.selection_bias is None else self.selection_bias[...])
        experts = chosen.experts
        if valid is not None:
            experts = jnp.where(valid[:, None], experts, self.experts)
        assignments = jnp.bincount(experts.reshape(-1), length=self.experts + 1)[:-1]
        load = Load(assignments.astype(jnp.float32), jnp.sum(masked(chosen.scores, valid), axis=0))
        return Routing(experts, chosen.weights, load)
