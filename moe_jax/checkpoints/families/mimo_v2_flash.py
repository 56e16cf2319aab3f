"""MiMo-V2-Flash (Xiaomi, 2025): sliding-window layers with sinks and with their own KV heads and rotary base."""

from dataclasses import replace

from moe_jax.checkpoints.families.deepseek_layers import dense_layers, moe_config, sigmoid_router
from moe_jax.checkpoints.families.llama_fields import FULL, SLIDING, layer_kinds, model
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK, DENSE_MLP, MODEL, MOE, SELECTION_BIAS
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import ROPE_PARAMETERS, read_layer_type_rope, read_rope
from moe_jax.checkpoints.weight_mapping import plain
from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig

SINKS = {"attention.sinks": plain(ATTENTION + "attention_sink_bias")}
SOURCES = {**MODEL, **ATTENTION_BLOCK, **SINKS, **DENSE_MLP, **MOE, **SELECTION_BIAS}
IGNORED_PREFIXES = ("model.mtp.",)
FRACTION = 0.334
"""Default of `partial_rotary_factor`."""


def read(fields: Fields) -> ModelConfig:
    fields.expect_all({"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_shared_experts": None})
    fields.ignore("attention_chunk_size", "hybrid_block_size")  # no layer uses them
    moe = moe_config(fields, sigmoid_router(fields, scale=1.0), experts="n_routed_experts", shared=None)
    dense = DenseConfig(fields.take("intermediate_size", int))
    attn = {FULL: _attention(fields, sliding=False), SLIDING: _attention(fields, sliding=True)}
    layers = fields.take("num_hidden_layers", int)
    kinds = [SLIDING if sliding else FULL for sliding in _flags(fields, "hybrid_layer_pattern")]
    kinds = layer_kinds(fields, layers, kinds or [SLIDING if i and (i + 1) % 6 else FULL for i in range(layers)])
    is_moe = _flags(fields, "moe_layer_freq") or [not is_dense for is_dense in dense_layers(fields, dense=1)]
    if len(is_moe) != layers:
        fields.problem(f"moe_layer_freq must hold 0 or 1 for each of {layers} layers, got {len(is_moe)} of them")
    ffns = [moe if routed else dense for routed in is_moe]
    eps = fields.take("layernorm_epsilon", float, 1e-5)
    return model(fields, [LayerConfig(attn[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=False)], eps=eps)


def _attention(fields: Fields, *, sliding: bool) -> AttentionConfig:
    """Read the attention of one type of layers. Fields with `swa` in their names are for sliding-window layers."""
    heads, kv_heads = fields.take("num_attention_heads", int), fields.take("num_key_value_heads", int)
    width, value_width = fields.take("head_dim", int), fields.take("v_head_dim", int)
    sinks = fields.take("add_full_attention_sink_bias", bool, False)
    if sliding:
        heads = fields.take("swa_num_attention_heads", int, heads)
        kv_heads = fields.take("swa_num_key_value_heads", int, 2 * kv_heads)
        width, value_width = fields.take("swa_head_dim", int, width), fields.take("swa_v_head_dim", int, value_width)
        sinks = fields.take("add_swa_attention_sink_bias", bool, True)
    if fields.has(ROPE_PARAMETERS):
        rope = read_layer_type_rope(fields, SLIDING if sliding else FULL, width, fraction=FRACTION)
    else:
        rope = read_rope(fields, width, theta=5e6, fraction=FRACTION)
        rope = replace(rope, theta=fields.take("swa_rope_theta", float, 1e4)) if sliding else rope
    window = fields.take("sliding_window", int, 129)
    if fields.has("sliding_window_size"):  # excludes the position itself
        window = fields.take("sliding_window_size", int) + 1
    return AttentionConfig(
        heads,
        kv_heads,
        width,
        rope,
        value_dim=value_width,
        value_scale=fields.take("attention_value_scale", float, 1.0),
        bias=fields.take("attention_bias", bool, False),
        sinks=sinks,
        window=window if sliding else None,
    )


def _flags(fields: Fields, name: str) -> list[bool]:
    """Read a field that holds 0 or 1 for each layer, as booleans; `[]` if it is missing."""
    values = fields.take_list(name, int)
    if set(values) - {0, 1}:
        fields.problem(f"{name} must hold 0 or 1 for each layer, got {values}")
    return [bool(value) for value in values]
