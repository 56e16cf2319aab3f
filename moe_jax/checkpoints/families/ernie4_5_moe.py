"""ERNIE 4.5 (Baidu, 2025): softmax router with selection bias, interleaved rotary embedding, periodic MoE layers."""

from moe_jax.checkpoints.families.llama_fields import attention, model
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MLP, MODEL, MOE, SHARED
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import arranged
from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig, SharedExpertConfig

BIAS = MLP + "moe_statics.e_score_correction_bias"
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    **DENSE_MLP,
    **MOE,
    **SHARED,
    "ffn.router.selection_bias": arranged(BIAS, parameter="e", tensor="1 e"),
}


def read(fields: Fields) -> ModelConfig:
    fields.expect_all({"use_bias": False, "moe_gate": "topk", "moe_use_aux_free": True})
    fields.ignore("moe_capacity")  # of training: decoding drops no row
    fields.ignore("moe_norm_min")  # far below the sum of any chosen scores
    attn = attention(fields, theta=5e5, interleaved=True)
    width, shared = fields.take("moe_intermediate_size", int), fields.get("moe_num_shared_experts", 2)
    moe = MoEConfig(
        experts=fields.take("moe_num_experts", int),
        top_k=fields.take("moe_k", int),
        width=width,
        router=RouterConfig(selection_bias=True, norm=1),
        shared=SharedExpertConfig(width * fields.take("moe_num_shared_experts", int, 2), False) if shared else None,
    )
    dense = DenseConfig(fields.take("intermediate_size", int))
    layers = [LayerConfig(attn, moe if is_moe else dense) for is_moe in _moe_layers(fields)]
    return model(fields, layers, eps=1e-5, tied=True)


def _moe_layers(fields: Fields) -> list[bool]:
    layers, every = fields.take("num_hidden_layers", int), fields.take("moe_layer_interval", int, 1)
    first, last = fields.get("moe_layer_start_index", 1), fields.get("moe_layer_end_index", -1)
    if not (type(first) is type(last) is int and first >= 0 and last >= -1):
        fields.problem(
            f"moe_layer_start_index and moe_layer_end_index must be layer numbers, got {first!r} and {last!r}"
        )
        first, last = 0, -1
    last = layers - 1 if last == -1 else last
    return [(layer + 1) % every == 0 and first <= layer <= last for layer in range(layers)]
