"""Tensor names of the Ling models; latent attention and feed-forward layers of the hybrid Ling models."""

from __future__ import annotations

from dataclasses import replace

from moe_jax.checkpoints.families import latent_attention
from moe_jax.checkpoints.families.deepseek_layers import feed_forwards
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MLP, MODEL, MOE, SHARED
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import Source, joined, linear, plain
from moe_jax.config import DenseConfig, LatentAttentionConfig, MoEConfig

ATTENTION = "model.layers.{layer}.attention."
LATENT = {
    name: replace(source, names=tuple(each.replace(".self_attn.", ".attention.") for each in source.names))
    for name, source in latent_attention.SOURCES.items()
} | {
    "attention.output": linear(ATTENTION + "dense.weight", inputs=2),
    "attention.output_bias": plain(ATTENTION + "dense.bias"),
}
SOURCES = {
    **MODEL,
    "embedding.table": plain("model.word_embeddings.weight"),
    "attention_norm.weight": ATTENTION_BLOCK["attention_norm.weight"],
    "ffn_norm.weight": ATTENTION_BLOCK["ffn_norm.weight"],
    **DENSE_MLP,
    **MOE,
    "ffn.router.selection_bias": plain(MLP + "gate.expert_bias"),
    **SHARED,
}


def qkv_sources(mixer: str) -> dict[str, Source]:
    """Return the sources of a token mixer that has its queries, keys and values in one tensor."""
    parts = (f"{mixer}.{part}.weight" for part in ("query", "key", "value"))
    return {
        **joined(ATTENTION + "query_key_value.weight", *parts),
        **{f"{mixer}.{part}_norm.weight": plain(ATTENTION + f"{part}_layernorm.weight") for part in ("query", "key")},
        f"{mixer}.output": linear(ATTENTION + "dense.weight", inputs=2),
    }


def latent_layer(fields: Fields) -> LatentAttentionConfig:
    """Read the layers with latent attention. `partial_rotary_factor` is for the heads of the other layers."""
    attn = latent_attention.latent_attention(fields, interleaved=fields.take("rope_interleave", bool, True))
    return replace(attn, rope=replace(attn.rope, width=None))


def hybrid_feed_forwards(
    fields: Fields, *, scale: float, dense: int, n_group: int, topk_group: int
) -> list[DenseConfig | MoEConfig]:
    """Read the feed-forward layer of each decoder layer; the arguments are those of `feed_forwards`."""
    fields.expect_all(SUPPORTED)
    for name in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list"):
        if any(fields.take_list(name, float)):
            fields.problem(f"{name} limits what experts compute, which is not supported")
    width = fields.take("moe_intermediate_size", int)
    fields.expect("moe_shared_expert_intermediate_size", width)
    return feed_forwards(
        fields,
        experts="num_experts",
        shared="num_shared_experts",
        scale=scale,
        dense=dense,
        n_group=n_group,
        topk_group=topk_group,
    )


SUPPORTED = {
    "score_function": "sigmoid",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "routing_group_score_top_k": 2,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
}
"""Fields with a single supported value."""
