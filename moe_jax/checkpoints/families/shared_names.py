"""Tensor names that most families share, after Llama's."""

from moe_jax.checkpoints.weight_mapping import linear, plain

ATTENTION = "model.layers.{layer}.self_attn."
ATTENTION_BLOCK = {
    "attention_norm.weight": plain("model.layers.{layer}.input_layernorm.weight"),
    "attention.query.weight": linear(ATTENTION + "q_proj.weight"),
    "attention.key.weight": linear(ATTENTION + "k_proj.weight"),
    "attention.value.weight": linear(ATTENTION + "v_proj.weight"),
    "attention.query.bias": plain(ATTENTION + "q_proj.bias"),
    "attention.key.bias": plain(ATTENTION + "k_proj.bias"),
    "attention.value.bias": plain(ATTENTION + "v_proj.bias"),
    "attention.query_norm.weight": plain(ATTENTION + "q_norm.weight"),
    "attention.key_norm.weight": plain(ATTENTION + "k_norm.weight"),
    "attention.output": linear(ATTENTION + "o_proj.weight", inputs=2),
    "attention.output_bias": plain(ATTENTION + "o_proj.bias"),
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
SELECTION_BIAS = {"ffn.router.selection_bias": plain(MLP + "gate.e_score_correction_bias")}
SHARED = {
    "ffn.shared.swiglu.gate_up": linear(MLP + "shared_experts.gate_proj.weight", MLP + "shared_experts.up_proj.weight"),
    "ffn.shared.swiglu.down": linear(MLP + "shared_experts.down_proj.weight"),
}
