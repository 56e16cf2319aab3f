"""Phi-3.5-MoE (arXiv:2404.14219): SparseMixer top-2 router, layer norms with bias, LongRoPE."""

from moe_jax.checkpoints.families.llama_fields import attention, experts, model, uniform_layers
from moe_jax.checkpoints.families.mixtral import EXPERTS
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import plain
from moe_jax.config import ModelConfig, MoEConfig, Norm, SparseMixerConfig

SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    **EXPERTS,
    "norm.bias": plain("model.norm.bias"),
    "head.bias": plain("lm_head.bias"),
    "attention_norm.bias": plain("model.layers.{layer}.input_layernorm.bias"),
    "ffn_norm.bias": plain("model.layers.{layer}.post_attention_layernorm.bias"),
}


def read(fields: Fields) -> ModelConfig:
    fields.ignore("input_jitter_noise")  # of training
    fields.expect("num_experts_per_tok", 2)
    moe = MoEConfig(
        experts=experts(fields),
        top_k=2,
        width=fields.take("intermediate_size", int),
        router=SparseMixerConfig(tolerance=2 * fields.take("router_jitter_noise", float, 0.01)),
    )
    bias = fields.take("attention_bias", bool, False)
    window = fields.take_optional("sliding_window", int)
    attn = attention(fields, theta=1e6, bias=bias, output_bias=bias, window=window)
    head_bias = fields.take("lm_head_bias", bool, False)
    return model(fields, uniform_layers(fields, attn, moe), eps=1e-5, norm=Norm.LAYER_WITH_BIAS, head_bias=head_bias)
