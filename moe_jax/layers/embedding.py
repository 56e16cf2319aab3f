"""Token embedding and LM head, with the vocabulary split over the heads axes.

V  vocabulary rows held here     D  hidden     T  rows
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import ModelConfig
from moe_jax.layers import parameter
from moe_jax.sharding import Combine, Role


class Vocabulary(nnx.Module):
    """A table of one vector per token, read by token (embedding) or multiplied with (LM head)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.size = config.vocab_size
        self.table = parameter.normal(
            rngs, (config.vocab_rows, config.hidden), (Role.HEADS, None), fan_in=config.hidden, dtype=dtype
        )

    def embed(self, tokens: Int32[Array, "T"], combine: Combine) -> Float[Array, "T D"]:
        table = self.table[...]
        local = tokens - combine.placement.index(Role.HEADS) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        found = table.at[local].get(mode="clip")
        return combine.sum_heads(combine.heads_partial_sum(jnp.where(here[:, None], found, 0)))

    def logits(self, x: Float[Array, "T D"], combine: Combine) -> Float[Array, "T vocab"]:
        """Scores of the whole vocabulary, in float32, the same on all heads devices."""
        local = jnp.einsum("td,vd->tv", x, self.table[...], preferred_element_type=jnp.float32)
        return combine.gather_heads(local)[:, : self.size]
