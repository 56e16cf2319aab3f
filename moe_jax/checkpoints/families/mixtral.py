"""Mixtral (arXiv:2401.04088): every layer an MoE, the kept softmax scores renormalised."""

from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, MODEL
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.names import linear
from moe_jax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig

MOE = "model.layers.{layer}.block_sparse_moe."
EXPERT = MOE + "experts.{expert}."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    "ffn.router.weight": linear(MOE + "gate.weight"),
    "ffn.experts.gate_up": linear(EXPERT + "w1.weight", EXPERT + "w3.weight"),
    "ffn.experts.down": linear(EXPERT + "w2.weight"),
}


def read(fields: Fields) -> ModelConfig:
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    fields.expect("hidden_act", "silu")
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", int),
        head_dim=fields.take("head_dim", int, hidden // heads),
        rope_theta=fields.rope_theta(default=1e6),
        window=fields.take_optional("sliding_window", int),
    )
    moe = MoEConfig(
        experts=fields.take("num_local_experts", int),
        top_k=fields.take("num_experts_per_tok", int),
        width=fields.take("intermediate_size", int),
        renormalise=True,
    )
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden=hidden,
        layers=(LayerConfig(attention, moe),) * fields.take("num_hidden_layers", int),
        norm_eps=fields.take("rms_norm_eps", float, 1e-5),
        max_positions=fields.take("max_position_embeddings", int),
        tied_embeddings=fields.take("tie_word_embeddings", bool, False),
    )
