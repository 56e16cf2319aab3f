"""DeepSeek-V3, R1 (arXiv:2412.19437): multi-head latent attention, sigmoid router with selection bias and groups."""

from moe_jax.checkpoints.families import latent_attention
from moe_jax.checkpoints.families.deepseek_layers import feed_forwards
from moe_jax.checkpoints.families.llama_fields import model
from moe_jax.checkpoints.families.shared_names import DENSE_MLP, MODEL, MOE, SELECTION_BIAS, SHARED
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import LayerConfig, ModelConfig

SOURCES = {**MODEL, **latent_attention.SOURCES, **DENSE_MLP, **MOE, **SELECTION_BIAS, **SHARED}


def read(fields: Fields) -> ModelConfig:
    fields.expect_all({"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1})
    attn = latent_attention.latent_attention(fields, interleaved=fields.take("rope_interleave", bool, True))
    ffns = feed_forwards(
        fields, experts="n_routed_experts", shared="n_shared_experts", scale=2.5, dense=3, n_group=8, topk_group=4
    )
    return model(fields, [LayerConfig(attn, ffn) for ffn in ffns], eps=1e-6)
