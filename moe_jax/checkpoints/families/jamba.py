"""Jamba (arXiv:2403.19887): Mamba layers, attention without RoPE on every few layers, dense MLPs and MoEs."""

from __future__ import annotations

import math

from moe_jax.checkpoints.families.llama_fields import experts, model
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import arranged, convolution, joined, linear, plain
from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, MambaConfig, ModelConfig, MoEConfig, RouterConfig

FFN, MAMBA = "model.layers.{layer}.feed_forward.", "model.layers.{layer}.mamba."
EXPERT = FFN + "experts.{expert}."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    "norm.weight": plain("model.final_layernorm.weight"),
    "ffn_norm.weight": plain("model.layers.{layer}.pre_ff_layernorm.weight"),
    **joined(MAMBA + "in_proj.weight", "recurrence.input.weight", "recurrence.gate.weight"),
    **joined(MAMBA + "in_proj.bias", "recurrence.input.bias", "recurrence.gate.bias", source=plain),
    "recurrence.convolution.weight": convolution(MAMBA + "conv1d.weight"),
    "recurrence.convolution.bias": plain(MAMBA + "conv1d.bias"),
    "recurrence.select": linear(MAMBA + "x_proj.weight"),
    "recurrence.step_norm.weight": plain(MAMBA + "dt_layernorm.weight"),
    "recurrence.into_norm.weight": plain(MAMBA + "b_layernorm.weight"),
    "recurrence.out_norm.weight": plain(MAMBA + "c_layernorm.weight"),
    "recurrence.step.weight": linear(MAMBA + "dt_proj.weight"),
    "recurrence.step.bias": plain(MAMBA + "dt_proj.bias"),
    "recurrence.log_rates": arranged(MAMBA + "A_log", parameter="h n", tensor="h n"),
    "recurrence.skip": plain(MAMBA + "D"),
    "recurrence.output": linear(MAMBA + "out_proj.weight"),
    "recurrence.output_bias": plain(MAMBA + "out_proj.bias"),
    "ffn.swiglu.gate_up": linear(FFN + "gate_proj.weight", FFN + "up_proj.weight"),
    "ffn.swiglu.down": linear(FFN + "down_proj.weight"),
    "ffn.router.weight": linear(FFN + "router.weight"),
    "ffn.experts.gate_up": linear(EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
    "ffn.experts.down": linear(EXPERT + "down_proj.weight"),
}


def read(fields: Fields) -> ModelConfig:
    fields.expect_all({"sliding_window": None, "mamba_inner_layernorms": True})
    fields.rename("n_ctx", "max_position_embeddings")
    fields.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan")  # choices of kernels
    fields.ignore("num_logits_to_keep", "calc_logits_for_entire_prompt")
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    attention = AttentionConfig(
        heads, fields.take("num_key_value_heads", int, heads), fields.take("head_dim", int, hidden // heads), rope=None
    )
    mamba = MambaConfig(
        channels=fields.take("mamba_expand", int, 2) * hidden,
        d_state=fields.take("mamba_d_state", int, 16),
        dt_rank=_rank(fields, hidden),
        d_conv=fields.take("mamba_d_conv", int, 4),
        convolution_bias=fields.take("mamba_conv_bias", bool, True),
        bias=fields.take("mamba_proj_bias", bool, False),
    )
    width, count = fields.take("intermediate_size", int), experts(fields)
    top_k, dense = fields.take("num_experts_per_tok", int), DenseConfig(width)
    moe = MoEConfig(count, top_k, width, RouterConfig()) if count > 1 else dense
    mixers = [attention if is_attention else mamba for is_attention in _layers(fields, "attn_layer", 8, 4)]
    ffns = [moe if is_moe else dense for is_moe in _layers(fields, "expert_layer", 2, 1)]
    return model(fields, map(LayerConfig, mixers, ffns), eps=1e-6)


def _layers(fields: Fields, kind: str, period: int, offset: int) -> list[bool]:
    """For each layer, True if it is of the kind: one layer in each period is, at an offset.

    Args:
      kind: prefix of the fields `{kind}_period` and `{kind}_offset`.
      period, offset: defaults of these fields, in layers.
    """
    every, at = fields.take(f"{kind}_period", int, period), fields.get(f"{kind}_offset", offset)
    if type(at) is not int or not 0 <= at < every:
        fields.problem(f"{kind}_offset must be a number of layers, less than {kind}_period, got {at!r}")
    return [layer % every == at for layer in range(fields.take("num_hidden_layers", int))]


def _rank(fields: Fields, hidden: int) -> int:
    automatic = fields.get("mamba_dt_rank", "auto") == "auto"
    return math.ceil(hidden / 16) if automatic else fields.take("mamba_dt_rank", int)
