"""Step-3.5-Flash (StepFun, 2026): more heads on sliding-window layers, gated heads, limited SwiGLU on some layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from moe_jax.checkpoints.families.deepseek_layers import dense_layers
from moe_jax.checkpoints.families.llama_fields import FULL, SLIDING, layer_kinds, model
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK, DENSE_MLP, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import ROPE_PARAMETERS, ROPE_SCALING, read_layer_type_rope, read_rope_object
from moe_jax.checkpoints.weight_mapping import arranged, linear, plain
from moe_jax.config import (
    Activation,
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    LimitedSwiGLUConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    OutputGate,
    QKNorm,
    RopeConfig,
    RouterConfig,
    Score,
    SharedExpertConfig,
    SwiGLUConfig,
)

MOE, SHARED = "model.layers.{layer}.moe.", "model.layers.{layer}.share_expert."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    **DENSE_MLP,
    "attention.gate.weight": linear(ATTENTION + "g_proj.weight"),
    "ffn.router.weight": linear(MOE + "gate.weight"),
    "ffn.router.selection_bias": plain(MOE + "router_bias"),
    "ffn.experts.gate_up": arranged(
        MOE + "gate_proj.weight", MOE + "up_proj.weight", parameter="e d f", tensor="e f d"
    ),
    "ffn.experts.down": arranged(MOE + "down_proj.weight", parameter="e f d", tensor="e d f"),
    "ffn.shared.swiglu.gate_up": linear(SHARED + "gate_proj.weight", SHARED + "up_proj.weight"),
    "ffn.shared.swiglu.down": linear(SHARED + "down_proj.weight"),
}
SUPPORTED = {
    "att_impl_type": "GQA",
    "mlp_bias": False,
    "moe_every_n_layer": 1,
    "moe_layer_offset": 0,
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "sink": False,
    "use_head_wise_attn_gate": True,
    "use_moe": True,
    "use_moe_router_bias": True,
    "use_qk_norm": True,
    "use_rope_layers": [],
    "yarn_only_types": [FULL],
    "zero_centered": True,
}
"""Fields with a single supported value."""


def read(fields: Fields) -> ModelConfig:
    fields.expect_all(SUPPORTED)
    fields.ignore("mtp_layer_types", "mtp_mlp_layer_types")
    fields.ignore("max_seq_len")  # other fields hold the same
    fields.ignore("need_fp32_gate")  # the router is always float32
    layers = fields.take("num_hidden_layers", int)
    routed, shared = (_each(fields, name, layers, None) for name in ("swiglu_limits", "swiglu_limits_shared"))
    dense, width = _dense_layers(fields, layers), fields.take("intermediate_size", int)
    ffns = [
        DenseConfig(width, _limited(shared[layer])) if dense[layer] else _moe(fields, routed[layer], shared[layer])
        for layer in range(layers)
    ]
    return model(fields, map(LayerConfig, _attentions(fields, layers), ffns), eps=1e-5, norm=Norm.RMS_AROUND_ONE)


def _attentions(fields: Fields, layers: int) -> list[AttentionConfig]:
    kinds = layer_kinds(fields, layers, [FULL] * layers)
    heads, width = fields.take("num_attention_heads", int), fields.take("head_dim", int)
    kv_heads = fields.take(_present_name(fields, "num_key_value_heads", "num_attention_groups"), int)
    bias = fields.take("attention_bias", bool, False)
    full = AttentionConfig(
        heads,
        kv_heads,
        width,
        rope=None,
        bias=bias,
        output_bias=bias,
        qk_norm=QKNorm.HEAD,
        scale=fields.take("query_pre_attn_scalar", float, width) ** -0.5,
        output_gate=OutputGate.HEAD,
    )
    sliding = replace(
        full, heads=_sliding_heads(fields, full, kinds), window=fields.take_optional("sliding_window", int)
    )
    ropes = _ropes(fields, kinds, width)
    return [replace(sliding if kind == SLIDING else full, rope=rope) for kind, rope in zip(kinds, ropes, strict=True)]


def _sliding_heads(fields: Fields, full: AttentionConfig, kinds: list[str]) -> int:
    """Read the number of heads of the sliding-window layers, for which files have three forms."""
    other = fields.inner("attention_other_setting")
    other.expect("attention_type", SLIDING)
    other.expect("num_attention_groups", full.kv_heads)
    for name in ("head_dim", "true_head_dim"):
        other.expect(name, full.head_dim)
    heads = other.take("num_attention_heads", int, full.heads)
    heads = fields.take("num_sliding_attention_heads", int, heads)
    differing = {str(layer): {"num_attention_heads": heads} for layer, kind in enumerate(kinds) if kind == SLIDING}
    fields.expect("per_layer_config", differing, {} if heads == full.heads else differing)
    return heads


def _ropes(fields: Fields, kinds: list[str], width: int) -> list[RopeConfig]:
    """Read the rotary embedding of each layer.

    Newer files describe it for each type of layer. Older files list the numbers of each layer and scale only the layers
    with full attention.
    """
    if fields.has(ROPE_PARAMETERS):
        by_kind = {kind: read_layer_type_rope(fields, kind, width) for kind in set(kinds)}
        return [by_kind[kind] for kind in kinds]
    thetas = _each(fields, "rope_theta", len(kinds), 1e4)
    fractions = _each(fields, "partial_rotary_factors", len(kinds), 1.0)
    scaling = {FULL: fields.inner(ROPE_SCALING), SLIDING: Fields({})}
    return [
        read_rope_object(fields, scaling[kind], width, theta, fraction)
        for kind, theta, fraction in zip(kinds, thetas, fractions, strict=True)
    ]


def _moe(fields: Fields, limit: float | None, shared_limit: float | None) -> MoEConfig:
    experts = next((name for name in ("n_routed_experts", "num_local_experts") if fields.has(name)), "moe_num_experts")
    scale = fields.take("moe_router_scaling_factor", float, 1.0)
    return MoEConfig(
        experts=fields.take(experts, int),
        top_k=fields.take(_present_name(fields, "num_experts_per_tok", "moe_top_k"), int),
        width=fields.take("moe_intermediate_size", int),
        router=RouterConfig(Score.SIGMOID, selection_bias=True, norm=1, scale=scale),
        shared=SharedExpertConfig(fields.take("share_expert_dim", int), gated=False, activation=_limited(shared_limit)),
        activation=_limited(limit),
    )


def _dense_layers(fields: Fields, layers: int) -> list[bool]:
    """For each layer, True if its feed-forward layer is dense. Older files list the MoE layers instead."""
    listed = fields.get("moe_layers_enum", None)
    if listed is None or fields.has("mlp_layer_types"):
        return dense_layers(fields, dense=3)
    try:
        routed = {int(layer) for layer in (listed.split(",") if isinstance(listed, str) else listed)}
    except (TypeError, ValueError):
        fields.problem(f"moe_layers_enum must be numbers of layers, got {listed!r}")
        routed = set()
    return [layer not in routed for layer in range(layers)]


def _each(fields: Fields, name: str, layers: int, default: Any) -> list[Any]:
    """Read a field that holds one number for all layers, or one for each layer (MTP layers may follow)."""
    value = fields.get(name, default)
    values = value[:layers] if isinstance(value, list) and value else [value or default] * layers
    if len(values) < layers or not all(each is None or _is_valid(each) for each in values):
        fields.problem(f"{name} must hold a number for each of {layers} layers, got {value!r}")
        return [default] * layers
    return [each or default for each in values]


def _is_valid(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _limited(limit: float | None) -> Activation:
    return SwiGLUConfig() if limit is None else LimitedSwiGLUConfig(limit)


def _present_name(fields: Fields, new: str, old: str) -> str:
    """Return the name that the file uses for a field."""
    return new if fields.has(new) else old
