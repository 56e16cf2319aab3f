"""Granite 3 MoE: multipliers of embeddings, scores, residuals and logits; each layer's experts in one tensor."""

from moe_jax.checkpoints.families.llama_fields import attention, model, uniform_layers
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import arranged, linear
from moe_jax.config import ModelConfig, MoEConfig, RouterConfig

MOE = "model.layers.{layer}.block_sparse_moe."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    "ffn.router.weight": linear(MOE + "router.layer.weight"),
    "ffn.experts.gate_up": arranged(MOE + "input_linear.weight", parameter="e d p f", tensor="e (p f) d"),
    "ffn.experts.down": arranged(MOE + "output_linear.weight", parameter="e f d", tensor="e d f"),
}


def read(fields: Fields) -> ModelConfig:
    moe = MoEConfig(
        experts=fields.take("num_local_experts", int),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("intermediate_size", int),
        router=RouterConfig(norm=1),
    )
    bias = fields.take("attention_bias", bool, False)
    scale = fields.take("attention_multiplier", float, 1.0)
    return model(
        fields,
        uniform_layers(fields, attention(fields, theta=1e4, bias=bias, output_bias=bias, scale=scale), moe),
        eps=1e-6,
        embedding_scale=fields.take("embedding_multiplier", float, 1.0),
        residual_scale=fields.take("residual_multiplier", float, 1.0),
        logit_scale=1 / fields.take("logits_scaling", float, 1.0),
    )
