"""Sarvam-105B (Sarvam AI, 2026): DeepSeek-V3 with groups of eight experts and other field names."""

from moe_jax.checkpoints.families import deepseek_v3, latent_attention
from moe_jax.checkpoints.families.deepseek_layers import feed_forwards
from moe_jax.checkpoints.families.llama_fields import experts, model
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import LayerConfig, ModelConfig

SOURCES = deepseek_v3.SOURCES


def read(fields: Fields) -> ModelConfig:
    fields.ignore("attn_implementation", "default_theta", "embedding_dropout", "output_dropout", "q_head_dim")
    fields.ignore("use_qk_norm")  # only the latent vectors are normalised, whatever the file has
    fields.expect("moe_router_enable_expert_bias", True)
    fields.expect("score_function", "sigmoid")
    attn = latent_attention.latent_attention(fields, interleaved=fields.take("rope_interleave", bool, True))
    groups = max(experts(fields) // 8, 1)
    ffns = feed_forwards(
        fields,
        experts="num_experts",
        shared="num_shared_experts",
        scale=2.5,
        dense=1,
        n_group=groups,
        topk_group=min(2, groups),
    )
    return model(fields, [LayerConfig(attn, ffn) for ffn in ffns], eps=1e-6)
