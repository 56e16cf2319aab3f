"""Qwen2-MoE (arXiv:2407.10671): biased query, key and value projections, a sigmoid-gated shared expert."""

from dataclasses import replace

from moe_jax.checkpoints.families.llama_fields import attention, model
from moe_jax.checkpoints.families.qwen_layers import SHARED, feed_forwards, shared_expert
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import LayerConfig, ModelConfig

SOURCES = {**MODEL, **ATTENTION_BLOCK, **DENSE_MLP, **MOE, **SHARED}


def read(fields: Fields) -> ModelConfig:
    ffns = feed_forwards(fields, shared_expert(fields))
    attn = attention(fields, theta=1e4, bias=fields.take("qkv_bias", bool, True))
    windows = _windows(fields, len(ffns))
    layers = [LayerConfig(replace(attn, window=window), ffn) for window, ffn in zip(windows, ffns, strict=True)]
    return model(fields, layers, eps=1e-6)


def _windows(fields: Fields, layers: int) -> list[int | None]:
    kinds = fields.take_list("layer_types", str)
    fields.ignore("max_window_layers")  # transformers derives layer_types from it
    if not fields.take("use_sliding_window", bool, False):
        fields.ignore("sliding_window")
        return [None] * layers
    window = fields.take("sliding_window", int)
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        fields.problem(
            f"use_sliding_window needs layer_types, one of sliding_attention and full_attention for each of {layers} "
            "layers: without it, different versions of transformers slide on different layers"
        )
        return [None] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
