"""Llama 4 (Meta, 2025): chunked attention with RoPE, full attention without it, router weights on expert inputs."""

from dataclasses import replace

from moe_jax.checkpoints.families.llama_fields import FULL, attention, experts, layer_kinds, model
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import arranged, linear
from moe_jax.config import (
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    QueryScalingConfig,
    RouterConfig,
    Score,
    SharedExpertConfig,
    Weighted,
    Window,
)

CHUNKED = "chunked_attention"
FFN = "model.layers.{layer}.feed_forward."
SHARED, EXPERTS = FFN + "shared_expert.", FFN + "experts."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    "ffn.swiglu.gate_up": linear(FFN + "gate_proj.weight", FFN + "up_proj.weight"),
    "ffn.swiglu.down": linear(FFN + "down_proj.weight"),
    "ffn.router.weight": linear(FFN + "router.weight"),
    "ffn.experts.gate_up": arranged(EXPERTS + "gate_up_proj", parameter="e d p f", tensor="e d (p f)"),
    "ffn.experts.down": arranged(EXPERTS + "down_proj", parameter="e f d", tensor="e f d"),
    "ffn.shared.swiglu.gate_up": linear(SHARED + "gate_proj.weight", SHARED + "up_proj.weight"),
    "ffn.shared.swiglu.down": linear(SHARED + "down_proj.weight"),
}


def read(fields: Fields) -> ModelConfig:
    fields.ignore("for_llm_compressor", "cache_implementation")
    width = fields.take("intermediate_size", int)
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int, 1),
        width=width,
        router=RouterConfig(Score.SIGMOID),
        shared=SharedExpertConfig(width, gated=False),
        weighted=Weighted.INPUT,
    )
    dense = DenseConfig(fields.take("intermediate_size_mlp", int))
    layers = range(fields.take("num_hidden_layers", int))
    step = fields.take("interleave_moe_layer_step", int, 1)
    routed = set(fields.take_list("moe_layers", int)) if fields.has("moe_layers") else set(layers[step - 1 :: step])
    return model(
        fields,
        [
            LayerConfig(attn, moe if layer in routed else dense)
            for layer, attn in zip(layers, _attentions(fields, len(layers)), strict=True)
        ],
        eps=1e-5,
    )


def _attentions(fields: Fields, layers: int) -> list[AttentionConfig]:
    """Read the attention of each layer."""
    bias, has_norm = fields.take("attention_bias", bool, False), fields.take("use_qk_norm", bool, True)
    norm = QKNorm.ROTATED_UNIT if has_norm else None
    rotated = attention(fields, theta=5e5, interleaved=True, bias=bias, output_bias=bias, qk_norm=norm)
    unrotated = replace(rotated, rope=None, qk_norm=None, query_scaling=_query_scaling(fields))
    has_rope = _rope_layers(fields, layers)
    kinds = layer_kinds(fields, layers, [CHUNKED if rope else FULL for rope in has_rope], local=CHUNKED)
    chunk = fields.take("attention_chunk_size", int, 8192)
    local = {"window": chunk, "window_kind": Window.CHUNKED}
    return [
        replace(rotated if rope else unrotated, **({} if kind == FULL else local))
        for rope, kind in zip(has_rope, kinds, strict=True)
    ]


def _query_scaling(fields: Fields) -> QueryScalingConfig | None:
    interval, strength = fields.take("floor_scale", int, 8192), fields.take("attn_scale", float, 0.1)
    tuned = fields.get("attn_temperature_tuning", True)
    if not isinstance(tuned, int):
        fields.problem(f"attn_temperature_tuning must be true or false, got {tuned!r}")
    return QueryScalingConfig(interval, strength) if tuned else None


def _rope_layers(fields: Fields, layers: int) -> list[bool]:
    """For each layer, True if it has a rotary embedding: `no_rope_layers` holds 1 for such a layer."""
    fields.rename("nope_layer_interval", "no_rope_layer_interval")
    interval = fields.take("no_rope_layer_interval", int, 4)
    listed = fields.take_list("no_rope_layers", int) or [int((layer + 1) % interval > 0) for layer in range(layers)]
    if len(listed) != layers or set(listed) - {0, 1}:
        fields.problem(f"no_rope_layers must hold 0 or 1 for each of {layers} layers, got {listed}")
        return [True] * layers
    return [bool(rope) for rope in listed]
