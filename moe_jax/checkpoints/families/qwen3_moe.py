"""Qwen3-MoE (arXiv:2505.09388): normalised query and key heads, no shared expert."""

from moe_jax.checkpoints.families.llama_fields import attention, model
from moe_jax.checkpoints.families.qwen_layers import feed_forwards
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import LayerConfig, ModelConfig, QKNorm

SOURCES = {**MODEL, **ATTENTION_BLOCK, **DENSE_MLP, **MOE}


def read(fields: Fields) -> ModelConfig:
    fields.expect_all({"attention_bias": False, "qkv_bias": False, "use_qk_norm": True})
    fields.expect("shared_expert_intermediate_size", 0)
    fields.ignore("max_window_layers")  # either all layers have a window, or none
    window = fields.take_optional("sliding_window", int)
    window = window if fields.take("use_sliding_window", bool, False) else None
    attn = attention(fields, theta=1e4, qk_norm=QKNorm.HEAD, window=window)
    return model(fields, [LayerConfig(attn, ffn) for ffn in feed_forwards(fields, shared=None)], eps=1e-6)
