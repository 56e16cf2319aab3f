"""Hunyuan-A13B: queries and keys normalised after the rotary embedding, NTK scaling with a fixed alpha."""

from moe_jax.checkpoints.families.llama_fields import attention, experts, model
from moe_jax.checkpoints.families.shared_names import ATTENTION, ATTENTION_BLOCK, MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import linear, plain
from moe_jax.config import LayerConfig, ModelConfig, MoEConfig, QKNorm, RouterConfig, SharedExpertConfig

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
    fields.ignore("eod_token_id", "sep_token_id")
    bias = fields.take("attention_bias", bool, False)
    attn = attention(fields, theta=1e4, qk_norm=QKNorm.ROTATED_HEAD, bias=bias, output_bias=bias)
    count, width = experts(fields), fields.take("intermediate_size", int)
    moes = [
        MoEConfig(count, top_k, width, RouterConfig(norm=1), SharedExpertConfig(width, gated=False))
        for top_k in _each_top_k(fields, fields.take("num_hidden_layers", int))
    ]
    return model(fields, [LayerConfig(attn, moe) for moe in moes], eps=1e-5)


def _each_top_k(fields: Fields, layers: int) -> list[int]:
    if not isinstance(fields.get("moe_topk", 1), list):
        return [fields.take("moe_topk", int, 1)] * layers
    each = fields.take_list("moe_topk", int)
    if len(each) != layers:
        fields.problem(f"moe_topk must be a number, or a list of {layers} numbers, one a layer, got {each}")
        each = [1] * layers
    return each
