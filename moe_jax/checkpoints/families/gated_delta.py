"""Gated delta nets interleaved with full attention, as in Qwen3-Next and its successors."""

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
    """Read the token mixer of each layer: a gated delta net or full attention."""
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
    """For each layer, True if it is recurrent.

    Where `layer_types` is missing, every n-th layer has full attention.

    Args:
      interval: name of the field that holds n.
      default: n, if the file omits that field.
    """
    layers, every = fields.take("num_hidden_layers", int), fields.take(interval, int, default)
    kinds = fields.take_list("layer_types", str)
    if kinds and (len(kinds) != layers or not set(kinds) <= {"linear_attention", "full_attention"}):
        fields.problem(f"layer_types must hold linear_attention or full_attention for each of {layers} layers")
        kinds = []
    return [kind == "linear_attention" for kind in kinds] or [(layer + 1) % every > 0 for layer in range(layers)]
