"""Ling and Ring (Ant Group, arXiv:2503.05139): queries, keys and values in one tensor; a head of unit columns."""

from __future__ import annotations

from moe_jax.checkpoints.families import ling_layers
from moe_jax.checkpoints.families.deepseek_layers import dense_layers, group_limit
from moe_jax.checkpoints.families.llama_fields import attention, experts, model
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import (
    DenseConfig,
    GroupScore,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RouterConfig,
    Score,
    SharedExpertConfig,
)

SOURCES = {**ling_layers.SOURCES, **ling_layers.heads("attention")}
ONLY = {
    "multi_gate": False,
    "norm_softmax": False,
    "router_type": "topN",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
"""Fields of which one value is understood."""
NOTHING = (
    "embedding_dropout",
    "max_window_layers",
    "mtp_loss_scaling_factor",
    "output_dropout",
    "router_dtype",
    "sliding_window",
)
"""Of training, of windows that no layer has, of layers that guess further tokens; the router is float32 always."""


def read(fields: Fields) -> ModelConfig:
    return model_of(fields)


def model_of(
    fields: Fields,
    *,
    qk_norm: bool = False,
    biased: bool = False,
    dense: int = 0,
    scale: float = 1.0,
    theta: float = 6e5,
) -> ModelConfig:
    """The model; the arguments are what the file may leave out.

    Args:
      biased: whether experts are chosen with a bias.
      dense: the number of first layers that are.
    """
    for name, value in ONLY.items():
        fields.expect(name, value)
    for name in NOTHING:
        fields.any(name, None)
    head_dim = fields.take("head_dim", int, fields.take("hidden_size", int) // fields.take("num_attention_heads", int))
    norm = QKNorm.HEAD if fields.take("use_qk_norm", bool, qk_norm) else None
    attended = attention(
        fields, theta=theta, fraction=fields.take("rotary_dim", int, head_dim) / head_dim, qk_norm=norm
    )
    first, moe = DenseConfig(fields.take("intermediate_size", int)), _moe(fields, biased, scale)
    layers = [LayerConfig(attended, first if is_dense else moe) for is_dense in dense_layers(fields, dense)]
    return model(fields, layers, eps=1e-6, norm_head=fields.take("norm_head", bool, False))


def _moe(fields: Fields, biased: bool, scale: float) -> MoEConfig:
    width, top_k = fields.take("moe_intermediate_size", int), fields.take("num_experts_per_tok", int)
    shared_width = fields.take("moe_shared_expert_intermediate_size", int, width)
    shared = fields.take("num_shared_experts", int) if fields.any("num_shared_experts", 0) else 0
    biased = fields.take("moe_router_enable_expert_bias", bool, biased)
    fields.expect("score_function", "sigmoid" if biased else "softmax")
    router = RouterConfig(
        Score.SIGMOID if biased else Score.SOFTMAX,
        selection_bias=biased,
        limit=group_limit(fields, GroupScore.BEST_TWO if biased else GroupScore.BEST, 1, 1),
        norm=1 if fields.take("norm_topk_prob", bool, True) and top_k > 1 else None,
        scale=fields.take("routed_scaling_factor", float, scale),
    )
    return MoEConfig(
        experts=experts(fields),
        top_k=top_k,
        width=width,
        router=router,
        shared=SharedExpertConfig(shared_width * shared, gated=False) if shared else None,
    )
