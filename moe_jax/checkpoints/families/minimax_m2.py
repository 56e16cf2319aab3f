"""MiniMax-M2: sigmoid router with selection bias; queries and keys normalised over all heads together."""

from moe_jax.checkpoints.families.llama_fields import attention, experts, model, uniform_layers
from moe_jax.checkpoints.families.mixtral import EXPERTS
from moe_jax.checkpoints.families.mixtral import MOE as MIXTRAL_MOE
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import plain
from moe_jax.config import ModelConfig, MoEConfig, QKNorm, RouterConfig, Score

SELECTION_BIAS = {"ffn.router.selection_bias": plain(MIXTRAL_MOE + "e_score_correction_bias")}
SOURCES = {**MODEL, **ATTENTION_BLOCK, **EXPERTS, **SELECTION_BIAS}

SUPPORTED = {
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "qk_norm_type": "per_layer",
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "use_qk_norm": True,
    "use_routing_bias": True,
}
"""Fields with a single supported value; older MiniMax families use others."""


def read(fields: Fields) -> ModelConfig:
    fields.ignore("mlp_intermediate_size", "shared_moe_mode")  # of layers that this family lacks
    fields.ignore("mtp_transformer_layers", "num_mtp_modules", "use_mtp")
    fields.expect_all(SUPPORTED)
    kinds = fields.take_list("attn_type_list", int)
    if set(kinds) - {1}:
        fields.problem(f"attn_type_list={kinds} is not supported (only 1, softmax attention)")
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("intermediate_size", int),
        router=RouterConfig(Score.SIGMOID, selection_bias=True, norm=1),
    )
    head_dim = fields.take("head_dim", int, 128)
    fraction = fields.take("rotary_dim", int, head_dim) / head_dim
    attn = attention(fields, theta=5e6, fraction=fraction, qk_norm=QKNorm.PROJECTION)
    return model(fields, uniform_layers(fields, attn, moe), eps=1e-6)
