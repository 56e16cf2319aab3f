"""Hunyuan-A13B: queries and keys normalised after the rotary embedding, NTK scaling with a fixed alpha."""

from moe_jax.checkpoints.families.llama_fields import attention, experts, model
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK, MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import linear, plain
from moe_jax.config import LayerConfig, ModelConfig, MoEConfig, QKNorm, RouterConfig, SharedExpertConfig

IMAGES = ("anyres_", "im_", "image_", "mask_init_", "num_media_", "text_end_", "text_start_", "video_", "vit_")
"""Prefixes of fields for images and videos, which the language model does not read."""
SHARED = MLP + "shared_mlp."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    **MOE,
    "attention.query_norm.weight": plain(ATTENTION + "query_layernorm.weight"),
    "attention.key_norm.weight": plain(ATTENTION + "key_layernorm.weight"),
    "ffn.router.weight": linear(MLP + "gate.wg.weight"),
    "ffn.shared.swiglu.gate_up": linear(SHARED + "gate_proj.weight", SHARED + "up_proj.weight"),
    "ffn.shared.swiglu.down": linear(SHARED + "down_proj.weight"),
}


def read(fields: Fields) -> ModelConfig:
    fields.ignore("eod_token_id")
    _check_published_fields(fields)
    bias = fields.take("attention_bias", bool, False)
    attn = attention(fields, theta=1e4, qk_norm=QKNorm.ROTATED_HEAD, bias=bias, output_bias=bias)
    count, width = experts(fields), fields.take("intermediate_size", int)
    moes = [
        MoEConfig(count, top_k, width, RouterConfig(norm=1), SharedExpertConfig(width, gated=False))
        for top_k in _each_top_k(fields, fields.take("num_hidden_layers", int))
    ]
    return model(fields, [LayerConfig(attn, moe) for moe in moes], eps=1e-5)


def _check_published_fields(fields: Fields) -> None:
    """Read the fields that transformers has no names for, which the checkpoints on the hub have."""
    fields.rename("attention_head_dim", "head_dim")
    for name, value in (("moe_intermediate_size", fields.get("intermediate_size", None)), ("num_shared_expert", 1)):
        each = fields.get(name, value)
        if any(one != value for one in (each if isinstance(each, list) else [each])):
            fields.problem(f"{name} must be {value!r} in all layers, got {each!r}")
    fields.expect_all(
        {
            "add_classification_head": False,
            "group_limited_greedy": False,
            "mlp_bias": False,
            "moe_drop_tokens": False,
            "moe_layer_num_skipped": 0,
            "norm_topk_prob": True,
            "norm_type": "rms",
            "position_embedding_xdrope": False,
            "routed_scaling_factor": 1.0,
            "use_cla": False,
            "use_mixed_mlp_moe": True,
            "use_mla": False,
            "use_qk_norm": True,
            "use_rotary_pos_emb": True,
        }
    )
    fields.ignore("cla_share_factor", "class_num", "dense_list", "moe_random_routing_dropped_token", "org_vocab_size")
    fields.ignore("pad_id", "pool_type", "skip_cls_token")
    fields.ignore(*(name for name in fields.names if name.startswith(IMAGES)))


def _each_top_k(fields: Fields, layers: int) -> list[int]:
    if not isinstance(fields.get("moe_topk", 1), list):
        return [fields.take("moe_topk", int, 1)] * layers
    each = fields.take_list("moe_topk", int)
    if len(each) != layers:
        fields.problem(f"moe_topk must be a number, or a list of {layers} numbers, one a layer, got {each}")
        each = [1] * layers
    return each
