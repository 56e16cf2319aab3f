"""Ling and Ring (Ant Group, arXiv:2503.05139): one query-key-value tensor, optional unit-length head columns."""

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

SOURCES = {**ling_layers.SOURCES, **ling_layers.qkv_sources("attention")}
SUPPORTED = {
    "multi_gate": False,
    "norm_softmax": False,
    "router_type": "topN",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
"""Fields with a single supported value."""
IGNORED_FIELDS = (
    "embedding_dropout",
    "max_window_layers",
    "mtp_loss_scaling_factor",
    "output_dropout",
    "router_dtype",
    "sliding_window",
)
"""Fields of training, of unused windows and of multi-token-prediction layers; the router is always float32."""


def read(fields: Fields) -> ModelConfig:
    return read_model(fields)


def read_model(
    fields: Fields,
    *,
    qk_norm: bool = False,
    biased: bool = False,
    dense: int = 0,
    scale: float = 1.0,
    theta: float = 6e5,
) -> ModelConfig:
    """Read the model config. The arguments are defaults of fields that the file may omit.

    Args:
      qk_norm: default of `use_qk_norm`.
      biased: default of `moe_router_enable_expert_bias`.
      dense: default of `first_k_dense_replace`, the number of dense layers before the first MoE.
      scale: default of `routed_scaling_factor`.
      theta: default of `rope_theta`.
    """
    fields.expect_all(SUPPORTED)
    fields.zero_as_missing("n_group", "topk_group")  # no groups
    fields.ignore(*IGNORED_FIELDS)
    head_dim = fields.take("head_dim", int, fields.take("hidden_size", int) // fields.take("num_attention_heads", int))
    norm = QKNorm.HEAD if fields.take("use_qk_norm", bool, qk_norm) else None
    attn = attention(fields, theta=theta, fraction=fields.take("rotary_dim", int, head_dim) / head_dim, qk_norm=norm)
    first, moe = DenseConfig(fields.take("intermediate_size", int)), _moe(fields, biased, scale)
    layers = [LayerConfig(attn, first if is_dense else moe) for is_dense in dense_layers(fields, dense)]
    return model(fields, layers, eps=1e-6, norm_head=fields.take("norm_head", bool, False))


def _moe(fields: Fields, biased: bool, scale: float) -> MoEConfig:
    width, top_k = fields.take("moe_intermediate_size", int), fields.take("num_experts_per_tok", int)
    shared_width = fields.take("moe_shared_expert_intermediate_size", int, width)
    shared = fields.take("num_shared_experts", int) if fields.get("num_shared_experts", 0) else 0
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
