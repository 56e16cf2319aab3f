"""Fields that most families have, under the names that Llama gave them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import read_rope
from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig, MoEConfig

SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of layers, as `layer_types` names them."""


def attention(
    fields: Fields, *, theta: float, fraction: float = 1.0, interleaved: bool = False, **choices: Any
) -> AttentionConfig:
    """Grouped-query attention with rotary embedding; `choices` are the fields of `AttentionConfig` beyond those.

    Args:
      theta, fraction, interleaved: see `read_rope`.
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
    """The model around the layers; `choices` are the fields of `ModelConfig` beyond those read here.

    Args:
      eps: of the norms, where the file has none.
    """
    fields.expect("hidden_act", "silu")
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden=fields.take("hidden_size", int),
        layers=tuple(layers),
        norm_eps=fields.take("rms_norm_eps", float, eps),
        max_positions=fields.take("max_position_embeddings", int),
        tied_embeddings=fields.take("tie_word_embeddings", bool, choices.pop("tied", False)),
        **choices,
    )


def alike(fields: Fields, attention: AttentionConfig, ffn: DenseConfig | MoEConfig) -> tuple[LayerConfig, ...]:
    """As many layers as the file says, all the same."""
    return (LayerConfig(attention, ffn),) * fields.take("num_hidden_layers", int)


def experts(fields: Fields) -> int:
    """How many there are: files of transformers 5 say `num_local_experts` where the hub says `num_experts`, or the
    other way round."""
    return fields.take("num_experts" if fields.has("num_experts") else "num_local_experts", int)


def layer_windows(fields: Fields, layers: int, pattern: list[str]) -> list[int | None]:
    """The window of each layer, as `layer_types` says.

    Args:
      pattern: the types where the file has none.
    """
    window = fields.take_optional("sliding_window", int)
    return [window if kind == SLIDING else None for kind in layer_kinds(fields, layers, pattern)]


def layer_kinds(fields: Fields, layers: int, pattern: list[str], near: str = SLIDING) -> list[str]:
    """What `layer_types` says of each layer, or the pattern where the file has none; `near` is the kind of those that
    are not full."""
    kinds = fields.take_list("layer_types", str) or pattern
    further = fields.any("num_nextn_predict_layers", 0)
    if isinstance(further, int) and len(kinds) == layers + further:  # which guess further tokens
        kinds = kinds[:layers]
    if len(kinds) != layers or not set(kinds) <= {near, FULL}:
        fields.problem(f"layer_types must say {near} or {FULL} for each of {layers} layers")
        return [FULL] * layers
    return kinds
