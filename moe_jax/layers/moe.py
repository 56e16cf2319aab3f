"""The Mixture-of-Experts feed-forward block: route, gather, compute, combine."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import MoEConfig
from moe_jax.layers.experts import Experts
from moe_jax.layers.mlp import SharedExpert
from moe_jax.layers.router import Load, Router, Routing
from moe_jax.sharding import Combine, Gathered, Rows


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
            gathered = self._gather(x, routing, rows, combine)
        everyone, experts, weights = gathered.values
        with jax.named_scope("experts"):
            partial = gathered.partial_sum(self.experts(everyone, experts, weights, combine.placement))
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                partial += gathered.partial_sum(self.shared(everyone))
        with jax.named_scope("combine"):
            return combine.combine(gathered, partial), routing.load

    def _gather(self, x: Float[Array, "T D"], routing: Routing, rows: Rows, combine: Combine) -> Gathered:
        """The rows that experts held here are for; with a shared expert, all rows."""
        if self.shared is None:
            return combine.dispatch(rows, x, routing.experts, routing.weights, self.experts.held)
        return combine.gather(rows, x, routing.experts, routing.weights)
