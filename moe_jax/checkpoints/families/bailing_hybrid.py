"""Ling 3: Kimi delta attention (arXiv:2510.26692), latent attention on every few layers, gated heads."""

from dataclasses import replace

from moe_jax.checkpoints.families import ling_layers
from moe_jax.checkpoints.families.gated_delta import CONVOLUTIONS, recurrent_layers
from moe_jax.checkpoints.families.ling_layers import ATTENTION
from moe_jax.checkpoints.families.llama_fields import model
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import convolution, linear, plain
from moe_jax.config import DecayConfig, DeltaConfig, HeadGate, LayerConfig, ModelConfig, OutputGate

PARTS = ("query", "key", "value")
SOURCES = {
    **ling_layers.SOURCES,
    **ling_layers.LATENT,
    "attention.gate.weight": linear(ATTENTION + "g_proj.weight"),
    **{f"recurrence.{part}.weight": linear(ATTENTION + f"{part[0]}_proj.weight") for part in PARTS},
    **{
        name: convolution(ATTENTION + f"{part[0]}_conv1d.weight")
        for part, name in zip(PARTS, CONVOLUTIONS, strict=True)
    },
    "recurrence.decay.projection.weight": linear(ATTENTION + "f_proj.weight"),
    "recurrence.decay.log_rate": plain(ATTENTION + "A_log"),
    "recurrence.decay.bias": plain(ATTENTION + "dt_bias"),
    "recurrence.strength.weight": linear(ATTENTION + "b_proj.weight"),
    "recurrence.gate.weight": linear(ATTENTION + "g_proj.weight"),
    "recurrence.norm.weight": plain(ATTENTION + "o_norm.weight"),
    "recurrence.output": linear(ATTENTION + "dense.weight", inputs=2),
}
ALTERNATIVE_SOURCES = {"recurrence.output": linear(ATTENTION + "o_proj.weight", inputs=2)}
SUPPORTED = {
    "no_kda_lora": True,
    "use_mla_nope": False,
    "q_lora_rank": None,
    "enable_gated_attention": True,
    "gated_attention_proj_granularity_type": "head_wise",
}


def read(fields: Fields) -> ModelConfig:
    for name, alias in ALIASES.items():
        fields.rename(alias, name)
    fields.expect_all(SUPPORTED)
    fields.ignore("use_qk_norm", "rotary_dim")  # other fields hold the same
    fields.ignore("mtp_loss_scaling_factor", "mtp_use_kda")  # of multi-token-prediction layers
    full = replace(ling_layers.latent_layer(fields), output_gate=OutputGate.HEAD)
    heads, width = full.heads, fields.take("linear_head_dim", int, fields.take("head_dim", int, 128))
    fields.expect("linear_num_heads", heads)
    kernel = fields.take("linear_conv_kernel_dim", int, fields.take("short_conv_kernel_size", int, 4))
    delta = DeltaConfig(heads, heads, width, width, kernel, _decay(fields), HeadGate.SIGMOID)
    mixers = [delta if recurrent else full for recurrent in recurrent_layers(fields, "layer_group_size", 6)]
    ffns = ling_layers.hybrid_feed_forwards(fields, scale=2.5, dense=2, n_group=8, topk_group=4)
    return model(fields, map(LayerConfig, mixers, ffns), eps=1e-6)


def _decay(fields: Fields) -> DecayConfig:
    floor = fields.get("kda_lower_bound", -5.0)
    if isinstance(floor, bool) or not isinstance(floor, int | float):
        fields.problem(f"kda_lower_bound must be a number, got {floor!r}")
        floor = -5.0
    return DecayConfig(each_channel=True, floor=float(floor) if fields.take("kda_safe_gate", bool, True) else None)


ALIASES = {
    "max_position_embeddings": "model_max_length",
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_experts_per_tok": "num_experts_per_token",
    "num_shared_experts": "n_shared_experts",
    "num_experts": "num_local_experts",
}
"""The hub's name of a field: the name that transformers may write instead."""
