"""DBRX (Databricks, 2024): clipped queries, keys and values in one tensor, layer norms, flattened experts."""

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import arranged, joined, linear, plain
from moe_jax.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, Norm, RopeConfig, RouterConfig

BLOCK = "transformer.blocks.{layer}."
ATTENTION, FFN = BLOCK + "norm_attn_norm.", BLOCK + "ffn."
EXPERTS = FFN + "experts.mlp."
QKV = ("attention.query.weight", "attention.key.weight", "attention.value.weight")
SOURCES = {
    "embedding.table": plain("transformer.wte.weight"),
    "norm.weight": plain("transformer.norm_f.weight"),
    "head.table": plain("lm_head.weight"),
    "attention_norm.weight": plain(ATTENTION + "norm_1.weight"),
    **joined(ATTENTION + "attn.Wqkv.weight", *QKV),
    "attention.output": linear(ATTENTION + "attn.out_proj.weight", inputs=2),
    "ffn_norm.weight": plain(ATTENTION + "norm_2.weight"),
    "ffn.router.weight": linear(FFN + "router.layer.weight"),
    "ffn.experts.gate_up": arranged(EXPERTS + "w1", EXPERTS + "v1", parameter="e d f", tensor="(e f) d"),
    "ffn.experts.down": arranged(EXPERTS + "w2", parameter="e f d", tensor="(e f) d"),
}


def read(fields: Fields) -> ModelConfig:
    fields.ignore("emb_pdrop", "resid_pdrop")  # used in training only
    fields.ignore("num_key_value_heads")  # attn_config has it too
    fields.expect("tie_word_embeddings", False)
    hidden, heads = fields.take("d_model", int), fields.take("n_heads", int)
    return ModelConfig(
        vocab_size=fields.take("vocab_size", int),
        hidden=hidden,
        layers=(LayerConfig(_attention(fields, heads, hidden // heads), _moe(fields.inner("ffn_config"), hidden)),)
        * fields.take("n_layers", int),
        norm_eps=1e-5,
        max_positions=fields.take("max_seq_len", int),
        norm=Norm.LAYER,
    )


def _attention(fields: Fields, heads: int, head_dim: int) -> AttentionConfig:
    inner = fields.inner("attn_config")
    inner.ignore("attn_pdrop")
    rope = fields.inner("rope_parameters")
    rope.expect("rope_type", "default")
    theta = rope.take("rope_theta", float, inner.take("rope_theta", float, 1e4))
    return AttentionConfig(
        heads,
        inner.take("kv_n_heads", int, 1),
        head_dim,
        RopeConfig(theta),
        clip=inner.take_optional("clip_qkv", float),
    )


def _moe(fields: Fields, hidden: int) -> MoEConfig:
    fields.ignore("moe_jitter_eps", "moe_loss_weight")
    fields.expect("hidden_size", hidden)
    fields.expect("ffn_act_fn", {"name": "silu"})
    power = fields.take("moe_normalize_expert_weights", float, 1.0)
    return MoEConfig(
        experts=fields.take("moe_num_experts", int),
        top_k=fields.take("moe_top_k", int),
        width=fields.take("ffn_hidden_size", int),
        router=RouterConfig(norm=power),
    )
