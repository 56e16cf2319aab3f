"""Mixtral (arXiv:2401.04088): an MoE in every layer, softmax router with renormalised top-k weights."""

from moe_jax.checkpoints.families.llama_fields import attention, experts, model, uniform_layers
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import linear
from moe_jax.config import ModelConfig, MoEConfig, RouterConfig

MOE = "model.layers.{layer}.block_sparse_moe."
EXPERT = MOE + "experts.{expert}."
EXPERTS = {
    "ffn.router.weight": linear(MOE + "gate.weight"),
    "ffn.experts.gate_up": linear(EXPERT + "w1.weight", EXPERT + "w3.weight"),
    "ffn.experts.down": linear(EXPERT + "w2.weight"),
}
SOURCES = {**MODEL, **ATTENTION_BLOCK, **EXPERTS}


def read(fields: Fields) -> ModelConfig:
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("intermediate_size", int),
        router=RouterConfig(norm=1),
    )
    attn = attention(fields, theta=1e6, window=fields.take_optional("sliding_window", int))
    return model(fields, uniform_layers(fields, attn, moe), eps=1e-5)
