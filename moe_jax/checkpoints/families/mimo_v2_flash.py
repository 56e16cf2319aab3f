"""MiMo-V2-Flash (Xiaomi, 2025): layers with windows have sinks, KV heads and a rotary base of their own."""

from dataclasses import replace

from moe_jax.checkpoints.families.deepseek_layers import dense_layers, moe_of, sigmoid_router
from moe_jax.checkpoints.families.llama_fields import FULL, SLIDING, layer_kinds, model
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK, DENSE_MLP, MODEL, MOE, SELECTION_BIAS
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import NEW, read_rope, read_rope_of
from moe_jax.checkpoints.weight_mapping import plain
from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, ModelConfig

SINKS = {"attention.sinks": plain(ATTENTION + "attention_sink_bias")}
SOURCES = {**MODEL, **ATTENTION_BLOCK, **SINKS, **DENSE_MLP, **MOE, **SELECTION_BIAS}
UNUSED = ("model.mtp.",)
FRACTION = 0.334
"""How much of a head is rotated."""


def read(fields: Fields) -> ModelConfig:
    for name, value in {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_shared_experts": None}.items():
        fields.expect(name, value)
    for name in ("attention_chunk_size", "hybrid_block_size"):  # files carry them; no layer is of such a kind
        fields.any(name, None)
    moe = moe_of(fields, sigmoid_router(fields, scale=1.0), experts="n_routed_experts", shared=None)
    dense = DenseConfig(fields.take("intermediate_size", int))
    attended = {FULL: _attention(fields, slides=False), SLIDING: _attention(fields, slides=True)}
    layers = fields.take("num_hidden_layers", int)
    kinds = [SLIDING if slides else FULL for slides in _switched(fields, "hybrid_layer_pattern")]
    kinds = layer_kinds(fields, layers, kinds or [SLIDING if i and (i + 1) % 6 else FULL for i in range(layers)])
    is_moe = _switched(fields, "moe_layer_freq") or [not is_dense for is_dense in dense_layers(fields, dense=1)]
    if len(is_moe) != layers:
        fields.problem(f"moe_layer_freq must say 0 or 1 for each of {layers} layers, got {len(is_moe)} of them")
    ffns = [moe if routed else dense for routed in is_moe]
    eps = fields.take("layernorm_epsilon", float, 1e-5)
    return model(fields, [LayerConfig(attended[kind], ffn) for kind, ffn in zip(kinds, ffns, strict=False)], eps=eps)


def _attention(fields: Fields, *, slides: bool) -> AttentionConfig:
    """Of one kind of layers. Sliding ones differ by fields whose names begin with `swa`."""
    heads, kv_heads = fields.take("num_attention_heads", int), fields.take("num_key_value_heads", int)
    width, value_width = fields.take("head_dim", int), fields.take("v_head_dim", int)
    sinks = fields.take("add_full_attention_sink_bias", bool, False)
    if slides:
        heads = fields.take("swa_num_attention_heads", int, heads)
        kv_heads = fields.take("swa_num_key_value_heads", int, 2 * kv_heads)
        width, value_width = fields.take("swa_head_dim", int, width), fields.take("swa_v_head_dim", int, value_width)
        sinks = fields.take("add_swa_attention_sink_bias", bool, True)
    if fields.has(NEW):
        rope = read_rope_of(fields, SLIDING if slides else FULL, width, fraction=FRACTION)
    else:
        rope = read_rope(fields, width, theta=5e6, fraction=FRACTION)
        rope = replace(rope, theta=fields.take("swa_rope_theta", float, 1e4)) if slides else rope
    window = fields.take("sliding_window", int, 129)
    if fields.has("sliding_window_size"):  # does not count the position itself
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
        window=window if slides else None,
    )


def _switched(fields: Fields, name: str) -> list[bool]:
    """A field that says 0 or 1 for each layer; empty where it is missing."""
    values = fields.take_list(name, int)
    if set(values) - {0, 1}:
        fields.problem(f"{name} must say 0 or 1 for each layer, got {values}")
    return [bool(value) for value in values]
