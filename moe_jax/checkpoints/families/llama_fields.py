"""Config fields that most families share, under Llama's names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import read_rope
from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig, MoEConfig

SLIDING, FULL = "sliding_attention", "full_attention"
"""Types of layers in `layer_types`."""


def attention(
    fields: Fields, *, theta: float, fraction: float = 1.0, interleaved: bool = False, **choices: Any
) -> AttentionConfig:
    """Read grouped-query attention with rotary embedding.

    Args:
      theta, fraction, interleaved: see `read_rope`.
      choices: further fields of `AttentionConfig`.
    """
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    head_dim = fields.take("head_dim", int, hidden // heads)
    return AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int, heads),
        head_dim=head_dim,
        rope=read_rope(fields, head_dim, theta=theta, fraction=fraction, interleaved=interleaved),
        **choices,
    )


def model(fields: Fields, layers: Iterable[LayerConfig], *, eps: float, **choices: Any) -> ModelConfig:
    """Read the model around the given layers.

    Args:
      eps: default of `rms_norm_eps`.
      choices: further fields of `ModelConfig`; `tied` is the default of `tie_word_embeddings`.
    """
    fields.expect("hidden_act", "silu", "swish")
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden=fields.take("hidden_size", int),
        layers=tuple(layers),
        norm_eps=fields.take("rms_norm_eps", float, eps),
        max_positions=fields.take("max_position_embeddings", int),
        tied_embeddings=fields.take("tie_word_embeddings", bool, choices.pop("tied", False)),
        **choices,
    )


def uniform_layers(fields: Fields, attention: AttentionConfig, ffn: DenseConfig | MoEConfig) -> tuple[LayerConfig, ...]:
    """Return `num_hidden_layers` equal layers."""
    return (LayerConfig(attention, ffn),) * fields.take("num_hidden_layers", int)


def experts(fields: Fields) -> int:
    """Read the number of routed experts.

    transformers 5 may write `num_local_experts` where the hub has `num_experts`, and the other way round.
    """
    return fields.take("num_experts" if fields.has("num_experts") else "num_local_experts", int)


def layer_windows(fields: Fields, layers: int, pattern: list[str]) -> list[int | None]:
    """Read the attention window of each layer; `None` for full attention.

    Args:
      pattern: default of `layer_types`.
    """
    window = fields.take_optional("sliding_window", int)
    return [window if kind == SLIDING else None for kind in layer_kinds(fields, layers, pattern)]


def layer_kinds(fields: Fields, layers: int, pattern: list[str], local: str = SLIDING) -> list[str]:
    """Read the type of each layer.

    Args:
      pattern: default of `layer_types`.
      local: the type of the layers without full attention.
    """
    kinds = fields.take_list("layer_types", str) or pattern
    mtp_layers = fields.get("num_nextn_predict_layers", 0)
    if isinstance(mtp_layers, int) and len(kinds) == layers + mtp_layers:
        kinds = kinds[:layers]
    if len(kinds) != layers or not set(kinds) <= {local, FULL}:
        fields.problem(f"layer_types must hold {local} or {FULL} for each of {layers} layers")
        return [FULL] * layers
    return kinds
