"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over a cache of latents, which all heads share.

T  rows     D  hidden     S  lines of a grid     C  their chunk     n  positions of a block
H  heads of this device
q  width of the latent of queries     r  width of the latent of keys and values
n  width of the plain part of a head's query and key, t  of the rotated part     v  width of a head's value

Two orders of the same products give the same output:

    expanded    keys and values of each head are made of the latents, of every position; then as usual
    absorbed    queries are taken to the latents, weighted latents to values: nothing is made of a position
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import LatentAttentionConfig
from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.kernels.kv_cache import CachedKV, KVBlock, KVCache
from moe_jax.kernels.online_softmax import MaskFn, weighted_values
from moe_jax.kernels.rope import Rotary
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.attention import HeadProjection, output_gate, products
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.parameter import once, product
from moe_jax.sharding import PartialSum, Role
from moe_jax.sharding.collectives import vary_alike

C = TypeVar("C", bound=KVCache)


class Down(nnx.Module):
    """Rows to latents: `[T, D] -> [T, r]`. Whole on every device."""

    def __init__(self, hidden: int, rank: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = parameter.matrix(rngs, (hidden, rank), (None, None), inputs=(0,), dtype=dtype)
        self.bias = parameter.zeros((rank,), (None,), dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T r"]:
        out = product("td,dr->tr", x, self.weight)
        return out if self.bias is None else out + self.bias[...]


class LatentAttention(nnx.Module):
    def __init__(self, config: LatentAttentionConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, rank, out = config.heads, config.kv_lora_rank, config.v_head_dim
        like = {"bias": config.bias, "dtype": dtype, "rngs": rngs}
        q_lora_rank, query_width = config.q_lora_rank, config.qk_nope_head_dim + config.qk_rope_head_dim
        query_like = {"bias": False, "dtype": dtype, "rngs": rngs}
        if q_lora_rank is None:
            self.query = HeadProjection(hidden, heads, query_width, Role.HEADS, **query_like)
        else:
            self.query_down = Down(hidden, q_lora_rank, **like)
            self.query_norm = RMSNorm(q_lora_rank, config.eps, dtype=dtype)
            self.query_up = HeadProjection(q_lora_rank, heads, query_width, Role.HEADS, **query_like)
        self.down = Down(hidden, rank + config.qk_rope_head_dim, **like)
        self.norm = RMSNorm(rank, config.eps, dtype=dtype)
        self.key_value = parameter.matrix(
            rngs, (rank, heads, config.qk_nope_head_dim + out), (None, Role.HEADS, None), inputs=(0,), dtype=dtype
        )
        self.rotary = Rotary(config.rope, config.qk_rope_head_dim)
        self.gate = output_gate(config.output_gate, hidden, heads, out, dtype=dtype, rngs=rngs)
        self.output = parameter.matrix(rngs, (heads, out, hidden), (Role.HEADS, None, None), inputs=(0, 1), dtype=dtype)
        self.output_bias = parameter.zeros((hidden,), (None,), dtype=dtype) if config.bias else None

    def __call__(self, x: Float[Array, "T D"], step: Step, cache: C, layer: Int32[Array, ""]) -> tuple[PartialSum, C]:
        """This device's heads' part of the output, and the cache with the rows' latents written."""
        batch, placement = step.batch, step.residual.placement
        query, (latent, rotated) = self._query(x, step), self._latent(x, step)
        latent, rotated, _ = vary_alike(latent, rotated, query)
        view, cache = cache.write(layer, rotated, latent, batch, self.config.window)
        with jax.named_scope("attend"):
            out = batch.to_rows([self._attend(query, view(layout), layout, batch) for layout in batch.layouts])
        if self.gate is not None:
            out *= jax.nn.sigmoid(self.gate(x))
        part = product("thv,hvd->td", out, self.output)
        if self.output_bias is not None:
            part += once(self.output_bias[...], placement, Role.HEADS)
        return step.residual.heads_partial_sum(part), cache

    def _attend(
        self, query: Float[Array, "T H _"], cached: CachedKV, layout: QueryLayout, batch: ForwardBatch
    ) -> Float[Array, "S C H v"]:
        """Each row sees the positions up to its own."""
        ordered = self.absorbed if self.absorbs(layout.chunk) else self.expanded

        def of_segments(cached: CachedKV, query: Float[Array, "S C H _"], own: Int32[Array, "S C"]) -> Array:
            return ordered(query, cached, lambda positions: positions[:, None] <= own[..., None])

        return cached.map_segments(
            of_segments, batch.to_padded(query, layout), batch.to_padded(batch.positions, layout)
        )

    def absorbs(self, chunk: int) -> bool:
        """Whether fewer products are needed to go to the latents than to expand them, for so many queries a line."""
        config = self.config
        absorbed = chunk * (2 * config.kv_lora_rank + config.qk_rope_head_dim)
        heads = config.qk_nope_head_dim + config.v_head_dim
        return absorbed <= config.kv_lora_rank * heads + chunk * (heads + config.qk_rope_head_dim)

    def expanded(self, query: Float[Array, "S C H _"], cached: CachedKV, seen: MaskFn) -> Float[Array, "S C H v"]:
        def look(block: KVBlock) -> tuple[Array, Array]:
            made = product("snr,rhw->hsnw", block.values[0], self.key_value)
            keys, values = jnp.split(made, [self.config.qk_nope_head_dim], axis=-1)
            shared = jnp.broadcast_to(block.keys, (*keys.shape[:3], block.keys.shape[3]))
            return products(query, jnp.concatenate([keys, shared], axis=-1)) * self.config.scale, values

        return weighted_values(query, cached, look, seen, (query.shape[2], self.config.v_head_dim))

    def absorbed(self, query: Float[Array, "S C H _"], cached: CachedKV, seen: MaskFn) -> Float[Array, "S C H v"]:
        width = self.config.qk_nope_head_dim
        plain, turned = jnp.split(query, [width], axis=-1)
        in_latents = product("schn,rhn->schr", plain, self.key_value, lambda whole: whole[..., :width])

        def look(block: KVBlock) -> tuple[Array, Array]:
            scores = products(in_latents, block.values) + products(turned, block.keys)
            return scores * self.config.scale, block.values

        weighted = weighted_values(query, cached, look, seen, cached.value_shape)
        return product("schr,rhv->schv", weighted, self.key_value, lambda whole: whole[..., width:])

    def _query(self, x: Float[Array, "T D"], step: Step) -> Float[Array, "T H _"]:
        """Of this device's heads, the plain part and then the rotated one."""
        through_latent = self.config.q_lora_rank is not None
        query = self.query_up(self.query_norm(self.query_down(x))) if through_latent else self.query(x)
        plain, turned = jnp.split(query, [self.config.qk_nope_head_dim], axis=-1)
        return jnp.concatenate([plain, step.rotate(turned, self.rotary)], axis=-1)

    def _latent(self, x: Float[Array, "T D"], step: Step) -> tuple[Float[Array, "T 1 r"], Float[Array, "T 1 t"]]:
        """The normalised latent, and the rotated part of the key."""
        latent, turned = jnp.split(self.down(x)[:, None], [self.config.kv_lora_rank], axis=-1)
        return self.norm(latent), step.rotate(turned, self.rotary)
