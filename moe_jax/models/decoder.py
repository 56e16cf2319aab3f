"""Decoder of every model, assembled from its config and written for one device of a placement.

T  rows of this token shard     B  rows that this device keeps between blocks     D  hidden size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import (
    DeltaConfig,
    LatentAttentionConfig,
    LayerConfig,
    LightningConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    RecurrentConfig,
)
from moe_jax.kernels.kv_cache import KVCache
from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.stacked_weight import LayerSlice
from moe_jax.kernels.step import Step
from moe_jax.layers import (
    Attention,
    DeltaAttention,
    DenseMLP,
    LatentAttention,
    LightningAttention,
    Load,
    Mamba,
    MoE,
    Vocabulary,
    row_norm,
)
from moe_jax.models.grouping import Group

Caches = list[list[KVCache | States]]
"""KV cache or recurrent states for each layer of each group's unit, with arrays stacked over the repeats."""
Mixer: TypeAlias = Attention | LatentAttention | DeltaAttention | Mamba | LightningAttention
"""Layer that mixes the positions of a sequence."""


class DecoderLayer(nnx.Module):
    """Pre-norm layer: a mixer, then a feed-forward block, each with a residual connection."""

    def __init__(
        self, layer: LayerConfig, model: ModelConfig, layer_indices: range, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """`layer_indices` are the indices of the layers that share this module, one for each repeat."""
        hidden, eps = model.hidden, model.norm_eps
        self.residual_scale = model.residual_scale
        self.attention_norm = row_norm(model.norm, hidden, eps, dtype=dtype)
        mixer = _mixer(layer, model, layer_indices, dtype=dtype, rngs=rngs)
        recurrent = isinstance(layer.attention, RecurrentConfig)
        self.attention, self.recurrence = (None, mixer) if recurrent else (mixer, None)
        self.ffn_norm = row_norm(model.norm, hidden, eps, dtype=dtype)
        self.ffn = (
            MoE(layer.ffn, hidden, dtype=dtype, rngs=rngs)
            if isinstance(layer.ffn, MoEConfig)
            else DenseMLP(layer.ffn, hidden, dtype=dtype, rngs=rngs)
        )

    @property
    def mixer(self) -> Mixer:
        mixer = self.recurrence if self.attention is None else self.attention
        assert mixer is not None
        return mixer

    def __call__(
        self, x: Float[Array, "B D"], step: Step, cache: Any, repeat: Int32[Array, ""]
    ) -> tuple[Float[Array, "B D"], Any, Load | None]:
        with jax.named_scope("attention"):
            rows = step.residual.all_rows(self.attention_norm(x), step.capacity)
            attended, cache = self.mixer(rows, step, cache, repeat)
            x = x + step.residual.sum_heads(attended) * self.residual_scale
        with jax.named_scope("ffn"):
            y, load = self.ffn(self.ffn_norm(x), step.rows, step.combine)
        return x + y * self.residual_scale, cache, load


def _mixer(layer: LayerConfig, model: ModelConfig, layer_indices: range, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Mixer:
    hidden, eps = model.hidden, model.norm_eps
    match layer.attention:
        case LatentAttentionConfig() as config:
            return LatentAttention(config, hidden, dtype=dtype, rngs=rngs)
        case DeltaConfig() as config:
            return DeltaAttention(config, hidden, eps, dtype=dtype, rngs=rngs)
        case MambaConfig() as config:
            return Mamba(config, hidden, eps, dtype=dtype, rngs=rngs)
        case LightningConfig() as config:
            return LightningAttention(config, hidden, layer_indices, eps, dtype=dtype, rngs=rngs)
        case config:
            return Attention(config, hidden, model.norm, eps, dtype=dtype, rngs=rngs)


class Stack(nnx.Module):
    """Group of repeating layers: parameters are stacked over the repeats, and the layers run in a `lax.scan`."""

    def __init__(self, group: Group, model: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=group.repeats)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stacked(rngs: nnx.Rngs) -> nnx.List:
            unit = zip(group.unit, group.layer_indices, strict=True)
            return nnx.List([DecoderLayer(layer, model, indices, dtype=dtype, rngs=rngs) for layer, indices in unit])

        self.repeats = group.repeats
        self.unit = stacked(rngs)

    def __call__(
        self, x: Float[Array, "B D"], step: Step, caches: list[KVCache | States]
    ) -> tuple[Float[Array, "B D"], list[KVCache | States], list[Load]]:
        """Run all repeats. Return the hidden states, the caches, and the router loads, stacked over the repeats."""
        graph, parameters = nnx.split(self.unit)

        def body(carry: tuple[Array, list[KVCache | States]], repeat: tuple[Array, Any]) -> tuple[Any, list[Load]]:
            (x, caches), (index, sliced) = carry, repeat
            slices = jax.tree.map(lambda part, stack: LayerSlice(part, stack, index), sliced, parameters)
            new_caches, loads = [], []
            for layer, cache in zip(nnx.merge(graph, slices), caches, strict=True):
                x, cache, load = layer(x, step, cache, index)
                new_caches.append(cache)
                loads += [] if load is None else [load]
            return (x, new_caches), loads

        (x, caches), loads = lax.scan(body, (x, caches), (jnp.arange(self.repeats), parameters))
        return x, caches, loads


class Decoder(nnx.Module):
    """Embedding, stacks of layers, final norm and head."""

    def __init__(self, config: ModelConfig, groups: Sequence[Group], *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embedding_scale, self.norm_head = config.embedding_scale, config.norm_head
        self.embedding = Vocabulary(config, dtype=dtype, rngs=rngs)
        self.stacks = nnx.List([Stack(group, config, dtype=dtype, rngs=rngs) for group in groups])
        rotaries = dict.fromkeys(layer.mixer.rotary for stack in self.stacks for layer in stack.unit)
        self.rotaries = tuple(rotary for rotary in rotaries if rotary is not None)
        self.norm = row_norm(config.norm, config.hidden, config.norm_eps, dtype=dtype)
        self.head = (
            None if config.tied_embeddings else Vocabulary(config, bias=config.head_bias, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self, tokens: Int32[Array, "T"], step: Step, caches: Caches
    ) -> tuple[Float[Array, "T D"], Caches, list[Load]]:
        """Run the layers.

        Returns:
          Hidden states of all rows, ready for the head; caches with the rows written; the load of each MoE layer.
        """
        step = step.with_rotations(self.rotaries)
        x = self.embedding.embed(tokens, step.residual) * self.embedding_scale
        new_caches, loads = [], []
        for stack, unit_caches in zip(self.stacks, caches, strict=True):
            x, unit_caches, unit_loads = stack(x, step, unit_caches)
            new_caches.append(unit_caches)
            loads += unit_loads
        x = self.norm(step.residual.all_rows(x, step.capacity))
        if self.norm_head:
            x = (x / self.vocabulary.column_norms(step.residual.placement)).astype(x.dtype)
        return x, new_caches, loads

    @property
    def vocabulary(self) -> Vocabulary:
        """Table that turns hidden states into logits: the head, or the embedding if they are tied."""
        return self.embedding if self.head is None else self.head
