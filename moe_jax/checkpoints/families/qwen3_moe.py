"""Qwen3-MoE (arXiv:2505.09388): normalised query and key heads, no shared expert."""

from moe_jax.checkpoints.families.qwen_layers import feed_forwards
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import AttentionConfig, LayerConfig, ModelConfig

SOURCES = {**MODEL, **ATTENTION_BLOCK, **DENSE_MLP, **MOE}


def read(fields: Fields) -> ModelConfig:
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    fields.expect("hidden_act", "silu")
    fields.expect("attention_bias", False)
    fields.any("max_window_layers", None)  # files carry it; the family slides on all layers or on none
    window = fields.take_optional("sliding_window", int)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int),
        head_dim=fields.take("head_dim", int, hidden // heads),
        rope_theta=fields.rope_theta(default=1e4),
        qk_norm=True,
        window=window if fields.take("use_sliding_window", bool, False) else None,
    )
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden=hidden,
        layers=tuple(LayerConfig(attention, ffn) for ffn in feed_forwards(fields, shared=None)),
        norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        max_positions=fields.take("max_position_embeddings", int),
        tied_embeddings=fields.take("tie_word_embeddings", bool, False),
    )
