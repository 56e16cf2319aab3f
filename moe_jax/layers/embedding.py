"""Token embedding and LM head, with the vocabulary split over the heads axes.

V  vocabulary rows held here     D  hidden     T  rows     B  rows that this device keeps
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import ModelConfig
from moe_jax.layers import parameter
from moe_jax.sharding import Placement, ResidualLayout, Role
from moe_jax.sharding.collectives import sum_devices


class Vocabulary(nnx.Module):
    """A table with one vector per token, to look tokens up (embedding) or to score them (LM head)."""

    def __init__(self, config: ModelConfig, *, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.size, self.scale = config.vocab_size, config.logit_scale
        self.table = parameter.normal(
            rngs, (config.vocab_rows, config.hidden), (Role.HEADS, None), fan_in=config.hidden, dtype=dtype
        )
        self.bias = parameter.zeros((config.vocab_rows,), (Role.HEADS,), dtype=dtype) if bias else None

    def embed(self, tokens: Int32[Array, "T"], residual: ResidualLayout) -> Float[Array, "B D"]:
        """Look up the vectors of the rows that this device keeps."""
        table = self.table[...]
        local = tokens - residual.placement.index(Role.HEADS) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        vectors = table.at[local].get(mode="clip")
        return residual.sum_heads(residual.heads_partial_sum(jnp.where(here[:, None], vectors, 0)))

    def column_norms(self, placement: Placement) -> Float[Array, "D"]:
        """Compute the L2 norm of each column of the whole table, at least 1e-7."""
        table = self.table[...].astype(jnp.float32)
        token = placement.index(Role.HEADS) * table.shape[0] + jnp.arange(table.shape[0])
        squares = jnp.sum(jnp.where(token[:, None] < self.size, table**2, 0), axis=0)
        return jnp.maximum(jnp.sqrt(sum_devices(squares, placement.axes(Role.HEADS))), 1e-7)

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Score the part of the vocabulary that this device holds, in float32."""
        local = jnp.einsum("td,vd->tv", x, self.table[...], preferred_element_type=jnp.float32)
        if self.bias is not None:
            local += self.bias[...]
        return local * self.scale

    def all_logits(self, x: Float[Array, "T D"], residual: ResidualLayout) -> Float[Array, "T vocab"]:
        """Score the whole vocabulary: the same on all heads devices."""
        return residual.gather_columns(self.logits(x))[:, : self.size]
