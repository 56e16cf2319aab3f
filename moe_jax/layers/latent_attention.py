"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over a cache of latents, which all heads share.

T  rows     D  hidden     S  segments of a query layout     C  rows of a segment     n  positions of a block
H  heads of this device     q, r  widths of the query latent and the KV latent     v  width of a head's value
p, t  widths of the parts of a head's query and key without and with rotary embedding

Two orders of the same products give the same output:

    expanded    compute each head's keys and values from the latents of every position, then attend as usual
    absorbed    project the queries to the latents, and the weighted latents to values
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import LatentAttentionConfig
from moe_jax.kernels.attention import causal_mask, query_key_products
from moe_jax.kernels.kv_cache import CachedKV, KVBlock
from moe_jax.kernels.online_softmax import MaskFn, online_softmax
from moe_jax.kernels.rope import Rotary
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.cached_attention import CachedAttention
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.parameter import einsum
from moe_jax.layers.projection import HeadProjection, LatentProjection, output_gate
from moe_jax.sharding import Role
from moe_jax.sharding.collectives import vary_alike


class LatentAttention(CachedAttention):
    """Multi-head latent attention. The cache holds a latent and one rotated key for each position."""

    def __init__(self, config: LatentAttentionConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config, self.window = config, config.window
        heads, rank, value_width = config.heads, config.kv_lora_rank, config.v_head_dim
        like = {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        q_lora_rank, query_width = config.q_lora_rank, config.qk_nope_head_dim + config.qk_rope_head_dim
        query_like = {"bias": False, "dtype": dtype, "rngs": rngs}
        if q_lora_rank is None:
            self.query = HeadProjection(hidden, heads, query_width, Role.HEADS, **query_like)
        else:
            self.query_down = LatentProjection(hidden, q_lora_rank, **like)
            self.query_norm = RMSNorm(q_lora_rank, config.eps, dtype=dtype)
            self.query_up = HeadProjection(q_lora_rank, heads, query_width, Role.HEADS, **query_like)
        self.down = LatentProjection(hidden, rank + config.qk_rope_head_dim, **like)
        self.norm = RMSNorm(rank, config.eps, dtype=dtype)
        shape = rank, heads, config.qk_nope_head_dim + value_width
        self.key_value = parameter.matrix(rngs, shape, (None, Role.HEADS, None), inputs=(0,), dtype=dtype)
        self.rotary = Rotary(config.rope, config.qk_rope_head_dim)
        self.gate = output_gate(config.output_gate, hidden, heads, value_width, dtype=dtype, rngs=rngs)
        self.output = parameter.matrix(
            rngs, (heads, value_width, hidden), (Role.HEADS, None, None), inputs=(0, 1), dtype=dtype
        )
        self.output_bias = parameter.zeros((hidden,), (None,), dtype=dtype) if config.bias else None

    def absorbs(self, chunk: int) -> bool:
        """Return True if the absorbed order needs fewer products, for `chunk` queries of a sequence."""
        config = self.config
        absorbed = chunk * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
        heads = config.qk_nope_head_dim + config.v_head_dim
        return absorbed <= config.kv_lora_rank * heads + chunk * (heads + config.qk_rope_head_dim)

    def expanded(self, query: Float[Array, "S C H _"], cached: CachedKV, mask: MaskFn) -> Float[Array, "S C H v"]:
        """Attend in the expanded order."""

        def score(block: KVBlock) -> tuple[Array, Array]:
            expanded = einsum("snr,rhw->hsnw", block.values[0], self.key_value)
            keys, values = jnp.split(expanded, [self.config.qk_nope_head_dim], axis=-1)
            rotated = jnp.broadcast_to(block.keys, (*keys.shape[:3], block.keys.shape[3]))
            keys = jnp.concatenate([keys, rotated], axis=-1)
            return query_key_products(query, keys) * self.config.scale, values

        return online_softmax(query, cached, score, mask, (query.shape[2], self.config.v_head_dim))

    def absorbed(self, query: Float[Array, "S C H _"], cached: CachedKV, mask: MaskFn) -> Float[Array, "S C H v"]:
        """Attend in the absorbed order."""
        width = self.config.qk_nope_head_dim
        plain, rotated = jnp.split(query, [width], axis=-1)
        latent_query = einsum("schn,rhn->schr", plain, self.key_value, lambda whole: whole[..., :width])

        def score(block: KVBlock) -> tuple[Array, Array]:
            scores = query_key_products(latent_query, block.values) + query_key_products(rotated, block.keys)
            return scores * self.config.scale, block.values

        latents = online_softmax(query, cached, score, mask, cached.value_shape)
        return einsum("schr,rhv->schv", latents, self.key_value, lambda whole: whole[..., width:])

    def _project(
        self, x: Float[Array, "T D"], step: Step
    ) -> tuple[Float[Array, "T H _"], Float[Array, "T 1 t"], Float[Array, "T 1 r"]]:
        """Compute the queries; the rotated keys, cached as keys; and the latents, cached as values."""
        query, (latent, rotated) = self._query(x, step), self._latent(x, step)
        latent, rotated, _ = vary_alike(latent, rotated, query)
        return query, rotated, latent

    def _attend(
        self, query: Float[Array, "S C H _"], cached: CachedKV, positions: Int32[Array, "S C"]
    ) -> Float[Array, "S C H v"]:
        attend = self.absorbed if self.absorbs(query.shape[1]) else self.expanded
        return attend(query, cached, causal_mask(positions))

    def _query(self, x: Float[Array, "T D"], step: Step) -> Float[Array, "T H _"]:
        """Compute the queries of this device's heads, the part without rotary embedding first."""
        through_latent = self.config.q_lora_rank is not None
        query = self.query_up(self.query_norm(self.query_down(x))) if through_latent else self.query(x)
        plain, rotated = jnp.split(query, [self.config.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([plain, step.rotate(rotated, self.rotary)], axis=-1)

    def _latent(self, x: Float[Array, "T D"], step: Step) -> tuple[Float[Array, "T 1 r"], Float[Array, "T 1 t"]]:
        """Compute the normalized latent, and the rotated part of the key."""
        latent, rotated = jnp.split(self.down(x)[:, None], [self.config.kv_lora_rank], axis=-1)
        return self.norm(latent), step.rotate(rotated, self.rotary)
