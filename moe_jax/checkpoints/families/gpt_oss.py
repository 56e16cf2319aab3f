"""gpt-oss (arXiv:2508.10925): attention sinks, sliding windows on alternate layers, biased experts, clamped SwiGLU."""

from dataclasses import replace

from moe_jax.checkpoints.families.llama_fields import attention, experts, layer_windows, model
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK, MLP, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import arranged, linear, plain
from moe_jax.config import ClampedSwiGLUConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig

EXPERTS = MLP + "experts."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    "attention.sinks": plain(ATTENTION + "sinks"),
    "ffn.router.weight": linear(MLP + "router.weight"),
    "ffn.router.bias": plain(MLP + "router.bias"),
    "ffn.experts.gate_up": arranged(EXPERTS + "gate_up_proj", parameter="e d p f", tensor="e d (f p)"),
    "ffn.experts.gate_up_bias": arranged(EXPERTS + "gate_up_proj_bias", parameter="e p f", tensor="e (f p)"),
    "ffn.experts.down": arranged(EXPERTS + "down_proj", parameter="e f d", tensor="e f d"),
    "ffn.experts.down_bias": arranged(EXPERTS + "down_proj_bias", parameter="e d", tensor="e d"),
}


def read(fields: Fields) -> ModelConfig:
    fields.ignore("initial_context_length", "experts_per_token")  # other fields hold the same
    layers, bias = fields.take("num_hidden_layers", int), fields.take("attention_bias", bool, True)
    limit, slope = fields.take("swiglu_limit", float, 7.0), fields.take("swiglu_alpha", float, 1.702)
    attn = attention(fields, theta=1.5e5, sinks=True, bias=bias, output_bias=bias)
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("intermediate_size", int),
        router=RouterConfig(bias=True, norm=1),
        activation=ClampedSwiGLUConfig(limit, slope),
        bias=True,
    )
    pattern = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    windows = layer_windows(fields, layers, pattern)
    return model(fields, [LayerConfig(replace(attn, window=window), moe) for window in windows], eps=1e-5)
