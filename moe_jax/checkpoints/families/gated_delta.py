"""Gated delta nets with full attention between them, as the files of Qwen3-Next and its successors describe them."""

from __future__ import annotations

from moe_jax.checkpoints.families.llama_fields import attention
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import convolution, joined, linear, plain
from moe_jax.config import AttentionConfig, DecayConfig, DeltaConfig, HeadGate, OutputGate, QKNorm

LINEAR = "model.layers.{layer}.linear_attn."
CONVOLUTIONS = (
    "recurrence.query_convolution.weight",
    "recurrence.key_convolution.weight",
    "recurrence.value_convolution.weight",
)
QUERY = "attention.query.weight"
SOURCES = {
    **ATTENTION_BLOCK,
    **joined(ATTENTION + "q_proj.weight", QUERY, "attention.gate.weight", heads_of=QUERY),
    **joined(LINEAR + "conv1d.weight", *CONVOLUTIONS, source=convolution),
    "recurrence.decay.log_rate": plain(LINEAR + "A_log"),
    "recurrence.decay.bias": plain(LINEAR + "dt_bias"),
    "recurrence.norm.weight": plain(LINEAR + "norm.weight"),
    "recurrence.output": linear(LINEAR + "out_proj.weight", inputs=2),
}


def mixers(fields: Fields) -> list[AttentionConfig | DeltaConfig]:
    """Each layer's: `layer_types` says which, or the last of so many is full attention."""
    fields.expect("attention_bias", False)
    full = attention(fields, theta=1e4, fraction=0.25, qk_norm=QKNorm.HEAD, output_gate=OutputGate.CHANNEL)
    delta = DeltaConfig(
        heads=fields.take("linear_num_value_heads", int),
        key_heads=fields.take("linear_num_key_heads", int),
        key_head_dim=fields.take("linear_key_head_dim", int),
        value_head_dim=fields.take("linear_value_head_dim", int),
        conv_kernel=fields.take("linear_conv_kernel_dim", int, 4),
        decay=DecayConfig(each_channel=False),
        gate=HeadGate.SILU,
    )
    return [delta if recurrent else full for recurrent in recurrent_layers(fields, "full_attention_interval", 4)]


def recurrent_layers(fields: Fields, interval: str, default: int) -> list[bool]:
    """Whether each layer is, from `layer_types`, or all but the last of every so many.

    Args:
      interval: the field that says how many.
    """
    layers, every = fields.take("num_hidden_layers", int), fields.take(interval, int, default)
    kinds = fields.take_list("layer_types", str)
    if kinds and (len(kinds) != layers or not set(kinds) <= {"linear_attention", "full_attention"}):
        fields.problem(f"layer_types must say linear_attention or full_attention for each of {layers} layers")
        kinds = []
    return [kind == "linear_attention" for kind in kinds] or [(layer + 1) % every > 0 for layer in range(layers)]
