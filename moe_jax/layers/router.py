"""Router: the experts that each row visits, and their weights.

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
    """Load of each expert: sums over a shard's real rows, for the balancing loss."""

    assignments: Float[Array, "E"]
    """Number of rows that chose each expert."""
    probabilities: Float[Array, "E"]
    """Sum of each expert's scores."""


class Routing(NamedTuple):
    """Experts of each row, and the load."""

    experts: Int32[Array, "T k"]
    """Chosen experts; E, beyond all experts, for pad rows."""
    weights: Float[Array, "T k"]
    """Weight of each chosen expert's output."""
    load: Load


class Router(nnx.Module):
    """Compute a logit for each expert and select the best, as the config says; in float32."""

    def __init__(self, config: MoEConfig, hidden: int, *, rngs: nnx.Rngs) -> None:
        experts, router = config.experts, config.router
        is_top_k = isinstance(router, RouterConfig)
        self.experts = experts
        self.weight = parameter.normal(rngs, (hidden, experts), (None, None), fan_in=hidden, dtype=jnp.float32)
        self.bias = parameter.zeros((experts,), (None,), dtype=jnp.float32) if is_top_k and router.bias else None
        self.selection_bias = (
            parameter.zeros((experts,), (None,), dtype=jnp.float32) if is_top_k and router.selection_bias else None
        )
        self.select = TopKRouting(router, config.top_k) if is_top_k else SparseMixer(router, config.top_k)

    def __call__(self, x: Float[Array, "T D"], valid: Bool[Array, "T"] | None) -> Routing:
        """Route rows. `valid` marks the real ones; `None` for all."""
        logits = x.astype(jnp.float32) @ self.weight[...]
        if self.bias is not None:
            logits += self.bias[...]
        selected = self.select(logits, None if self.selection_bias is None else self.selection_bias[...])
        experts = selected.experts
        if valid is not None:
            experts = jnp.where(valid[:, None], experts, self.experts)
        assignments = jnp.bincount(experts.reshape(-1), length=self.experts + 1)[:-1]
        load = Load(assignments.astype(jnp.float32), jnp.sum(masked(selected.scores, valid), axis=0))
        return Routing(experts, selected.weights, load)
