"""Multi-head latent attention, with the config fields and tensor names of DeepSeek."""

from __future__ import annotations

from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import read_rope, rope_object, yarn_mscale
from moe_jax.checkpoints.weight_mapping import linear, plain
from moe_jax.config import LatentAttentionConfig, YarnScaling

SOURCES = {
    "attention_norm.weight": ATTENTION_BLOCK["attention_norm.weight"],
    "ffn_norm.weight": ATTENTION_BLOCK["ffn_norm.weight"],
    "attention.query_down.weight": linear(ATTENTION + "q_a_proj.weight"),
    "attention.query_down.bias": plain(ATTENTION + "q_a_proj.bias"),
    "attention.query_norm.weight": plain(ATTENTION + "q_a_layernorm.weight"),
    "attention.query_up.weight": linear(ATTENTION + "q_b_proj.weight"),
    "attention.query.weight": ATTENTION_BLOCK["attention.query.weight"],
    "attention.down.weight": linear(ATTENTION + "kv_a_proj_with_mqa.weight"),
    "attention.down.bias": plain(ATTENTION + "kv_a_proj_with_mqa.bias"),
    "attention.norm.weight": plain(ATTENTION + "kv_a_layernorm.weight"),
    "attention.key_value": linear(ATTENTION + "kv_b_proj.weight"),
    "attention.output": ATTENTION_BLOCK["attention.output"],
    "attention.output_bias": ATTENTION_BLOCK["attention.output_bias"],
}


def latent_attention(fields: Fields, *, interleaved: bool) -> LatentAttentionConfig:
    """Read multi-head latent attention.

    With YaRN, `mscale_all_dim` scales the attention scores, by the square of its magnitude.

    Args:
      interleaved: rotate neighbouring channels instead of halves.
    """
    fields.ignore("num_key_value_heads", "head_dim", "qk_head_dim")  # the widths below imply them
    qk_nope_head_dim, qk_rope_head_dim = (fields.take(f"qk_{kind}_head_dim", int) for kind in ("nope", "rope"))
    rope = read_rope(fields, qk_rope_head_dim, theta=1e4, interleaved=interleaved)
    scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
    mscale_all_dim = rope_object(fields).take_optional("mscale_all_dim", float)
    if isinstance(rope.scaling, YarnScaling) and mscale_all_dim is not None:
        scale *= yarn_mscale(rope.scaling.factor, mscale_all_dim) ** 2
    return LatentAttentionConfig(
        heads=fields.take("num_attention_heads", int),
        q_lora_rank=fields.take_optional("q_lora_rank", int),
        kv_lora_rank=fields.take("kv_lora_rank", int),
        qk_nope_head_dim=qk_nope_head_dim,
        qk_rope_head_dim=qk_rope_head_dim,
        v_head_dim=fields.take("v_head_dim", int),
        rope=rope,
        scale=scale,
        bias=fields.take("attention_bias", bool, False),
    )
