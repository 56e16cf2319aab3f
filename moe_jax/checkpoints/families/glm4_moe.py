"""GLM-4.5 (arXiv:2508.06471): DeepSeek-V3 router, grouped-query attention, half of each head rotated."""

from moe_jax.checkpoints.families.deepseek_layers import feed_forwards
from moe_jax.checkpoints.families.llama_fields import attention, model
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MODEL, MOE, SELECTION_BIAS, SHARED
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import LayerConfig, ModelConfig, QKNorm

SOURCES = {**MODEL, **ATTENTION_BLOCK, **DENSE_MLP, **MOE, **SELECTION_BIAS, **SHARED}


def read(fields: Fields) -> ModelConfig:
    attn = attention(
        fields,
        theta=1e4,
        fraction=0.5,
        bias=fields.take("attention_bias", bool, False),
        qk_norm=QKNorm.HEAD if fields.take("use_qk_norm", bool, False) else None,
    )
    ffns = feed_forwards(fields, experts="n_routed_experts", shared="n_shared_experts", scale=1.0, dense=1)
    return model(fields, [LayerConfig(attn, ffn) for ffn in ffns], eps=1e-5)
