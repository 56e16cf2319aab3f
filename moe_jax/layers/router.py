"""Which experts each row visits, and with what weight.

T  own rows     D  hidden     E  experts     k  experts per row
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import MoEConfig
from moe_jax.layers import parameter
from moe_jax.sharding.rows import masked


class Load(NamedTuple):
    """How a shard's real rows spread over the experts: sums over rows, for the balancing loss."""

    assignments: Float[Array, "E"]
    """How often each expert was chosen."""
    probabilities: Float[Array, "E"]
    """The sum of each expert's softmax scores."""


class Routing(NamedTuple):
    experts: Int32[Array, "T k"]
    """The chosen experts; E, which is none, for pad rows."""
    weights: Float[Array, "T k"]
    load: Load


class Router(nnx.Module):
    """Softmax over all experts, best `top_k` kept (Shazeer et al., arXiv:1701.06538); float32 throughout."""

    def __init__(self, config: MoEConfig, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.weight = parameter.normal(rngs, (hidden, config.experts), (None, None), fan_in=hidden, dtype=jnp.float32)

    def __call__(self, x: Float[Array, "T D"], valid: Bool[Array, "T"] | None) -> Routing:
        scores = jax.nn.softmax(x.astype(jnp.float32) @ self.weight[...], axis=-1)
        weights, experts = lax.top_k(scores, self.config.top_k)
        if self.config.renormalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        if valid is not None:
            experts = jnp.where(valid[:, None], experts, self.config.experts)
        chosen = jnp.bincount(experts.reshape(-1), length=self.config.experts + 1)[:-1]
        load = Load(chosen.astype(jnp.float32), jnp.sum(masked(scores, valid), axis=0))
        return Routing(experts, weights, load)
