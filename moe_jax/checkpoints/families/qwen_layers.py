"""Feed-forward layers of the Qwen MoE families."""

from __future__ import annotations

from moe_jax.checkpoints.families.llama_fields import experts
from moe_jax.checkpoints.families.shared_names import MLP
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import linear
from moe_jax.config import DenseConfig, MoEConfig, RouterConfig, SharedExpertConfig

SHARED = {
    "ffn.shared.swiglu.gate_up": linear(MLP + "shared_expert.gate_proj.weight", MLP + "shared_expert.up_proj.weight"),
    "ffn.shared.swiglu.down": linear(MLP + "shared_expert.down_proj.weight"),
    "ffn.shared.gate": linear(MLP + "shared_expert_gate.weight"),
}


def shared_expert(fields: Fields) -> SharedExpertConfig:
    return SharedExpertConfig(fields.take("shared_expert_intermediate_size", int), gated=True)


def feed_forwards(
    fields: Fields, shared: SharedExpertConfig | None, *, norm: bool = False
) -> list[DenseConfig | MoEConfig]:
    """Read the feed-forward layer of each decoder layer.

    Every `decoder_sparse_step`-th layer is an MoE, unless `mlp_only_layers` lists it.

    Args:
      norm: default of `norm_topk_prob`.
    """
    dense = DenseConfig(fields.take("intermediate_size", int))
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("moe_intermediate_size", int),
        router=RouterConfig(norm=1 if fields.take("norm_topk_prob", bool, norm) else None),
        shared=shared,
    )
    step, only_dense = fields.take("decoder_sparse_step", int, 1), fields.take_list("mlp_only_layers", int)
    layers = range(fields.take("num_hidden_layers", int))
    return [dense if i in only_dense or (i + 1) % step else moe for i in layers]
