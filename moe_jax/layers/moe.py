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
    """Routed experts and, in some models, a shared expert. Their partial sums are added, then combined once.

    In your own model, call the layer on whole arrays with `moe_jax.layers.on_mesh(moe, placement)(x)`; called directly,
    it runs on one device of a placement, inside `jax.shard_map`. The shard that owns a row routes it, so that every
    device sees the same choice of experts.

    Args:
      config: `moe_jax.config.MoEConfig`: number and width of experts, router, shared expert.
      hidden: `hidden_size`, the width of a row (D).
      dtype: dtype of the experts; the router is in float32.
      rngs: Flax's random streams; `params` is used.
    """

    def __init__(self, config: MoEConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.router = Router(config, hidden, rngs=rngs)
        self.experts = Experts(config, hidden, dtype=dtype, rngs=rngs)
        self.shared = SharedExpert(config.shared, hidden, dtype=dtype, rngs=rngs) if config.shared else None

    def __call__(self, x: Float[Array, "T D"], rows: Rows, combine: Combine) -> tuple[Float[Array, "T D"], Load]:
        """Return the outputs of this device's rows, and its token shard's load."""
        with jax.named_scope("route"):
            routing = self.router(x, rows.valid(combine.placement))
        with jax.named_scope("gather"):
            gathered = self._gather(x, routing, rows, combine)
        all_rows, experts, weights = gathered.values
        with jax.named_scope("experts"):
            partial = gathered.partial_sum(self.experts(all_rows, experts, weights, combine.placement))
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                partial += gathered.partial_sum(self.shared(all_rows))
        with jax.named_scope("combine"):
            return combine.combine(gathered, partial), routing.load

    def _gather(self, x: Float[Array, "T D"], routing: Routing, rows: Rows, combine: Combine) -> Gathered:
        """Get the rows that visit experts held here; with a shared expert, all rows."""
        if self.shared is None:
            return combine.dispatch(rows, x, routing.experts, routing.weights, self.experts.num_local_experts)
        return combine.gather(rows, x, routing.experts, routing.weights)
