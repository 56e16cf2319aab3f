"""The Mixture-of-Experts feed-forward block: route, gather, compute, combine."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.layers.experts import Experts
from moe_jax.layers.mlp import SharedExpert
from moe_jax.layers.router import Load, Router
from moe_jax.sharding import Combine, Rows


class MoE(nnx.Module):
    """Routed experts and, in some models, a shared one; their partial sums are added and combined once.

    Rows are routed by the shard that owns them, so that every device sees the same choice of experts.
    """

    def __init__(self, config: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.router = Router(config, hidden, rngs=rngs)
        self.experts = Experts(config, hidden, dtype=dtype, rngs=rngs)
        self.shared = SharedExpert(config.shared, hidden, dtype=dtype, rngs=rngs) if config.shared else None

    def __call__(self, x: Float[Array, "T D"], rows: Rows, combine: Combine) -> tuple[Float[Array, "T D"], Load]:
        with jax.named_scope("route"):
            routing = self.router(x, rows.valid(combine.placement))
        with jax.named_scope("gather"):
            gathered = combine.gather(rows, (x, routing.experts, routing.weights))
        everyone, experts, weights = gathered.values
        with jax.named_scope("experts"):
            partial = gathered.partial_sum(self.experts(everyone, experts, weights, combine.placement))
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                partial += gathered.partial_sum(self.shared(everyone))
        with jax.named_scope("combine"):
            return combine.combine(rows, partial), routing.load
