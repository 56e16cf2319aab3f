"""Tensor names that most families use, after Llama's."""

from moe_jax.checkpoints.names import linear, plain

ATTENTION_BLOCK = {
    "attention_norm.weight": plain("model.layers.{layer}.input_layernorm.weight"),
    "attention.query.weight": linear("model.layers.{layer}.self_attn.q_proj.weight"),
    "attention.key.weight": linear("model.layers.{layer}.self_attn.k_proj.weight"),
    "attention.value.weight": linear("model.layers.{layer}.self_attn.v_proj.weight"),
    "attention.query.bias": plain("model.layers.{layer}.self_attn.q_proj.bias"),
    "attention.key.bias": plain("model.layers.{layer}.self_attn.k_proj.bias"),
    "attention.value.bias": plain("model.layers.{layer}.self_attn.v_proj.bias"),
    "attention.query_norm.weight": plain("model.layers.{layer}.self_attn.q_norm.weight"),
    "attention.key_norm.weight": plain("model.layers.{layer}.self_attn.k_norm.weight"),
    "attention.output": linear("model.layers.{layer}.self_attn.o_proj.weight", inputs=2),
    "ffn_norm.weight": plain("model.layers.{layer}.post_attention_layernorm.weight"),
}

MODEL = {
    "embedding.table": plain("model.embed_tokens.weight"),
    "norm.weight": plain("model.norm.weight"),
    "head.table": plain("lm_head.weight"),
}

MLP = "model.layers.{layer}.mlp."
DENSE_MLP = {
    "ffn.swiglu.gate_up": linear(MLP + "gate_proj.weight", MLP + "up_proj.weight"),
    "ffn.swiglu.down": linear(MLP + "down_proj.weight"),
}
MOE = {
    "ffn.router.weight": linear(MLP + "gate.weight"),
    "ffn.experts.gate_up": linear(MLP + "experts.{expert}.gate_proj.weight", MLP + "experts.{expert}.up_proj.weight"),
    "ffn.experts.down": linear(MLP + "experts.{expert}.down_proj.weight"),
}
