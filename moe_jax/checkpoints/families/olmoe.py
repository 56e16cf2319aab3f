"""OLMoE (arXiv:2409.02060): queries and keys normalised over all heads together."""

from moe_jax.checkpoints.families.llama_fields import attention, experts, model, uniform_layers
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import ModelConfig, MoEConfig, QKNorm, RouterConfig

SOURCES = {**MODEL, **ATTENTION_BLOCK, **MOE}


def read(fields: Fields) -> ModelConfig:
    fields.expect("attention_bias", False)
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("intermediate_size", int),
        router=RouterConfig(norm=1 if fields.take("norm_topk_prob", bool, False) else None),
    )
    clip = fields.take_optional("clip_qkv", float)
    attn = attention(fields, theta=1e4, qk_norm=QKNorm.PROJECTION, clip=clip)
    return model(fields, uniform_layers(fields, attn, moe), eps=1e-5)
