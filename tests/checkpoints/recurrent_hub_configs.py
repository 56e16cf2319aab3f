"""Configs of published checkpoints with recurrent layers, as on the Hugging Face hub, by model type."""

from __future__ import annotations

from typing import Any

# fmt: off
QWEN3_5_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "dtype": "bfloat16",
    "eos_token_id": 248044, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 10,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
    "mlp_only_layers": [], "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512, "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False, "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
    "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
    "rope_parameters": {
        "mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
        "rope_theta": 10000000, "rope_type": "default",
    },
    "shared_expert_intermediate_size": 512, "use_cache": True, "vocab_size": 248320,
}
HUB: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4,
        "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
        "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_next",
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.57.0.dev0", "use_cache": True, "vocab_size": 151936,
    },
    "qwen3_5_moe_text": QWEN3_5_TEXT,
    "qwen3_5_moe": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "image_token_id": 248056, "model_type": "qwen3_5_moe",
        "text_config": QWEN3_5_TEXT, "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057, "vision_config": {"depth": 27, "hidden_size": 1152},
        "vision_end_token_id": 248054, "vision_start_token_id": 248053,
    },
    "jamba": {
        "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4,
        "attn_layer_period": 8, "bos_token_id": 1, "eos_token_id": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_state": 16,
        "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_proj_bias": False, "max_position_embeddings": 262144,
        "model_type": "jamba", "num_attention_heads": 32, "num_experts": 16, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_logits_to_keep": 1, "output_router_logits": False,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_mamba_kernels": True,
        "vocab_size": 65536,
    },
    "bailing_hybrid": {
        "architectures": ["BailingMoeV3ForCausalLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "eos_token_id": 156895, "first_k_dense_replace": 2, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2560, "initializer_range": 0.006, "intermediate_size": 6144, "kda_lower_bound": -5.0,
        "kda_safe_gate": True, "kv_lora_rank": 512, "layer_group_size": 6, "max_position_embeddings": 262144,
        "model_type": "bailing_hybrid", "moe_intermediate_size": 768, "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 768, "n_group": 8, "no_kda_lora": True, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 512, "num_experts_per_tok": 8, "num_hidden_layers": 42,
        "num_key_value_heads": 32, "num_nextn_predict_layers": 1, "num_shared_experts": 1, "output_dropout": 0.0,
        "pad_token_id": 156892, "partial_rotary_factor": 0.5, "q_lora_rank": None, "qk_head_dim": 192,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_interleave": True,
        "rope_scaling": None, "rope_theta": 6000000, "rotary_dim": 64, "routed_scaling_factor": 2.5,
        "router_dtype": "fp32", "score_function": "sigmoid", "scoring_func": "sigmoid", "short_conv_kernel_size": 4,
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
        "use_bias": False, "use_mla_nope": False, "use_qk_norm": True, "use_qkv_bias": False, "v_head_dim": 128,
        "vocab_size": 157184,
    },
    "bailing_moe_linear": {
        "architectures": ["BailingMoeLinearV2ForCausalLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "eos_token_id": 156892, "first_k_dense_replace": 1, "group_norm_size": 4, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120, "layer_group_size": 5,
        "linear_silu": False, "max_position_embeddings": 131072, "model_type": "bailing_moe_linear",
        "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 512, "n_group": 8, "norm_topk_prob": True, "num_attention_heads": 16,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0, "num_shared_experts": 1, "output_dropout": 0.0, "pad_token_id": 156892,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "torch_dtype": "bfloat16", "use_bias": False,
        "use_cache": True, "use_qk_norm": True, "use_qkv_bias": False, "use_rmsnorm": True, "vocab_size": 157184,
    },
}
# fmt: on
