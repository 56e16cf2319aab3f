"""Qwen3.5-MoE, the language model alone: Qwen3-Next with separate projections and an MoE in every layer."""

from moe_jax.checkpoints.families import gated_delta
from moe_jax.checkpoints.families.llama_fields import experts, model
from moe_jax.checkpoints.families.qwen_layers import SHARED, shared_expert
from moe_jax.checkpoints.families.shared_names import MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import rope_object
from moe_jax.checkpoints.weight_mapping import joined, linear
from moe_jax.config import LayerConfig, ModelConfig, MoEConfig, Norm, RouterConfig

LINEAR = gated_delta.LINEAR
QKV = ("recurrence.query.weight", "recurrence.key.weight", "recurrence.value.weight")
MIXERS = {
    **gated_delta.SOURCES,
    **joined(LINEAR + "in_proj_qkv.weight", *QKV),
    "recurrence.gate.weight": linear(LINEAR + "in_proj_z.weight"),
    "recurrence.strength.weight": linear(LINEAR + "in_proj_b.weight"),
    "recurrence.decay.projection.weight": linear(LINEAR + "in_proj_a.weight"),
}
SOURCES = {**MODEL, **MIXERS, **MOE, **SHARED}
IGNORED_PREFIXES = ("mtp.",)


def read(fields: Fields, *, tied: bool = False) -> ModelConfig:
    fields.expect("attn_output_gate", True)
    fields.expect("mlp_only_layers", [])
    fields.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    fields.ignore("mamba_ssm_dtype")  # states are always float32
    rope_object(fields).ignore("mrope_section", "mrope_interleaved")  # text tokens have three equal positions
    moe = MoEConfig(
        experts=experts(fields),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("moe_intermediate_size", int),
        router=RouterConfig(norm=1),
        shared=shared_expert(fields),
    )
    layers = [LayerConfig(mixer, moe) for mixer in gated_delta.mixers(fields)]
    return model(fields, layers, eps=1e-6, norm=Norm.RMS_AROUND_ONE, tied=tied)
