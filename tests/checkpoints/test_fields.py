from __future__ import annotations

import contextlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_jax.checkpoints.families import FAMILIES
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import (
    AttentionConfig,
    BlockDiffusion,
    DenseConfig,
    GroupLimit,
    GroupScore,
    LatentAttentionConfig,
    LimitedSwiGLUConfig,
    Llama3Scaling,
    LongRopeScaling,
    ModelConfig,
    MoEConfig,
    Norm,
    QKNorm,
    QueryScalingConfig,
    RopeConfig,
    RouterConfig,
    Score,
    SwiGLUConfig,
    YarnScaling,
)
from moe_jax.errors import ConfigError

HUB = {
    # As Qwen3-30B-A3B's file on the hub has them.
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 8192,
        "max_window_layers": 21, "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
        "num_key_value_heads": 16, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.39.0.dev0",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "olmoe": {
        "attention_bias": False, "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 50304,
    },
    "granitemoe": {
        "attention_bias": False, "attention_dropout": 0.1, "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 512,
        "logits_scaling": 6.0, "max_position_embeddings": 4096, "model_type": "granitemoe", "num_attention_heads": 16,
        "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000,
        "tie_word_embeddings": True, "vocab_size": 49155,
    },
    "glm4_moe": {
        "attention_bias": True, "eos_token_id": [151329, 151336], "first_k_dense_replace": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
        "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
        "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False,
        "vocab_size": 151552,
    },
    "gpt_oss": {
        "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "rms_norm_eps": 1e-05, "rope_theta": 150000, "sliding_window": 128,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
    },
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000}, "d_model": 6144,
        "emb_pdrop": 0.0, "initializer_range": 0.02, "max_seq_len": 32768, "model_type": "dbrx", "n_heads": 48,
        "ffn_config": {
            "ffn_hidden_size": 10752, "model_type": "", "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05,
            "moe_num_experts": 16, "moe_top_k": 4,
        },
        "n_layers": 40, "resid_pdrop": 0.0, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "phimoe": {
        "attention_bias": True, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 4096,
        "input_jitter_noise": 0.01, "intermediate_size": 6400, "lm_head_bias": True,
        "max_position_embeddings": 131072, "model_type": "phimoe", "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 16,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "rope_scaling": {
            "long_factor": [2.0] * 64, "long_mscale": 1.25, "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 64, "short_mscale": 1.24, "type": "longrope",
        },
        "router_jitter_noise": 0.01, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "deepseek_v3": {
        "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 3,
        "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    },
    "bailing_moe": {  # Ling-mini-2.0's
        "architectures": ["BailingMoeV2ForCausalLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "eos_token_id": 156892, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 5120, "max_position_embeddings": 32768, "model_type": "bailing_moe",
        "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 512, "n_group": 8, "norm_topk_prob": True, "num_attention_heads": 16,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0, "num_shared_experts": 1, "output_dropout": 0.0, "pad_token_id": 156892,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000,
        "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "torch_dtype": "bfloat16", "use_bias": False,
        "use_cache": True, "use_qk_norm": True, "use_qkv_bias": False, "use_rmsnorm": True, "vocab_size": 157184,
    },
    "llada2_moe": {
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "dtype": "bfloat16", "embedding_dropout": 0.0,
        "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5120, "max_position_embeddings": 32768, "max_window_layers": 28,
        "model_type": "llada2_moe", "moe_intermediate_size": 512, "moe_router_enable_expert_bias": True, "n_group": 8,
        "norm_head": False, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256,
        "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4, "num_shared_experts": 1,
        "output_dropout": 0.0, "output_router_logits": False, "pad_token_id": 156892, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 600000, "rotary_dim": 64,
        "routed_scaling_factor": 2.5, "router_dtype": "fp32", "score_function": "sigmoid", "sliding_window": 4096,
        "tie_word_embeddings": False, "topk_group": 4, "use_bias": False, "use_cache": False, "use_qk_norm": True,
        "use_qkv_bias": False, "use_rmsnorm": True, "use_sliding_window": False, "vocab_size": 157184,
    },
    "sarvam_moe": {
        "architectures": ["SarvamMoEForCausalLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "attn_implementation": "eager", "eos_token_id": 1, "first_k_dense_replace": 1, "head_dim": 256,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.006, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "max_window_layers": 19, "model_type": "sarvam_moe",
        "moe_intermediate_size": 1024, "moe_router_enable_expert_bias": True, "n_group": 1, "num_attention_heads": 16,
        "num_experts": 128, "num_experts_per_tok": 6, "num_hidden_layers": 19, "num_key_value_heads": 4,
        "num_shared_experts": 1, "output_dropout": 0.0, "output_router_logits": False, "pad_token_id": 0,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 8000000.0, "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False, "topk_group": 1, "use_bias": False, "use_cache": True, "use_qk_norm": True,
        "use_qkv_bias": False, "vocab_size": 262144,
    },
    "sarvam_mla": {
        "architectures": ["SarvamMLAForCausalLM"], "attention_dropout": 0.0, "default_theta": 10000.0,
        "embedding_dropout": 0.0, "eos_token_id": 1, "first_k_dense_replace": 1, "head_dim": 576, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 16384, "kv_lora_rank": 512, "max_position_embeddings": 131072,
        "model_type": "sarvam_mla", "moe_intermediate_size": 2048, "moe_router_enable_expert_bias": True,
        "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 32,
        "num_shared_experts": 1, "output_dropout": 0.0, "q_head_dim": 192, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "deepseek_yarn",
        },
        "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "use_qk_norm": True, "v_head_dim": 128,
        "vocab_size": 262144,
    },
    "llama4": {
        "architectures": ["Llama4ForConditionalGeneration"], "boi_token_index": 200080, "eoi_token_index": 200081,
        "image_token_index": 200092, "model_type": "llama4", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "text_config": {
            "_attn_implementation_autoset": True, "attention_bias": False, "attention_chunk_size": 8192,
            "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": 4, "bos_token_id": 200000,
            "eos_token_id": [200001, 200007, 200008], "floor_scale": 8192, "for_llm_compressor": False,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
            "interleave_moe_layer_step": 1, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760, "model_type": "llama4_text", "no_rope_layers": [],
            "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "num_local_experts": 16, "output_router_logits": False, "pad_token_id": 200018, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
            "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True, "vocab_size": 202048,
        },
        "vision_config": {"hidden_size": 1408, "model_type": "llama4_vision_model"},
    },
    "mimo_v2_flash": {
        "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": True, "attention_bias": False,
        "attention_chunk_size": 128, "attention_value_scale": 0.707, "head_dim": 192, "hidden_act": "silu",
        "hidden_size": 4096, "hybrid_layer_pattern": [int(i > 0 and (i + 1) % 6 > 0) for i in range(48)],
        "intermediate_size": 16384, "layernorm_epsilon": 1e-05, "max_position_embeddings": 262144,
        "model_type": "mimo_v2_flash", "moe_intermediate_size": 2048, "moe_layer_freq": [0] + [1] * 47, "n_group": 1,
        "n_routed_experts": 256, "n_shared_experts": None, "norm_topk_prob": True, "num_attention_heads": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "partial_rotary_factor": 0.334,
        "rope_theta": 5000000, "routed_scaling_factor": None, "scoring_func": "sigmoid", "sliding_window": 128,
        "sliding_window_size": 128, "swa_head_dim": 192, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8,
        "swa_rope_theta": 10000, "swa_v_head_dim": 128, "tie_word_embeddings": False, "topk_group": 1,
        "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 152576,
    },
    "step3p5": {
        "architectures": ["Step3p5ForCausalLM"], "att_impl_type": "GQA", "bos_token_id": 0, "dtype": "bfloat16",
        "attention_other_setting": {
            "attention_type": "sliding_attention", "head_dim": 128, "num_attention_groups": 8,
            "num_attention_heads": 96, "true_head_dim": 128,
        },
        "eos_token_id": [1, 2, 128007], "head_dim": 128, "hidden_size": 4096, "intermediate_size": 11264,
        "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 12, "max_position_embeddings": 262144,
        "max_seq_len": 262144, "model_type": "step3p5", "moe_every_n_layer": 1, "moe_intermediate_size": 1280,
        "moe_layer_offset": 0, "moe_layers_enum": ",".join(str(layer) for layer in range(3, 45)),
        "moe_num_experts": 288, "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 3.0, "moe_top_k": 8,
        "need_fp32_gate": True, "norm_expert_weight": True, "num_attention_groups": 8, "num_attention_heads": 64,
        "num_hidden_layers": 45, "num_nextn_predict_layers": 3,
        "partial_rotary_factors": ([0.5] + [1.0] * 3) * 12, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 2.0, "high_freq_factor": 32.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 131072, "rope_type": "llama3",
        },
        "rope_theta": ([5e6] + [1e4] * 3) * 12, "share_expert_dim": 1280, "sliding_window": 512,
        "swiglu_limits": [0.0] * 43 + [7, 7] + [0.0] * 3, "swiglu_limits_shared": [0.0] * 44 + [16] + [0.0] * 3,
        "use_head_wise_attn_gate": True, "use_moe": True, "use_moe_router_bias": True, "use_qk_norm": True,
        "use_rope_layers": [], "vocab_size": 128896, "yarn_only_types": ["full_attention"], "zero_centered": True,
    },
}  # fmt: skip

HUB["llama4_text"] = HUB["llama4"]["text_config"]  # as a file of the text alone has it
DEFAULT = {"rope_type": "default"}
REWRITTEN: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    # The fields that transformers 5 leaves out of the file above, and those that it writes instead.
    "bailing_moe": (
        ("rope_theta", "rope_scaling", "partial_rotary_factor"),
        {"rope_parameters": {**DEFAULT, "rope_theta": 6e5, "partial_rotary_factor": 0.5}},
    ),
    "llama4_text": (
        ("rope_theta", "rope_scaling", "for_llm_compressor"),
        {
            "attn_temperature_tuning": True, "no_rope_layers": ([1] * 3 + [0]) * 12, "no_rope_layer_interval": 4,
            "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12, "moe_layers": list(range(48)),
            "rope_parameters": {
                "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "rope_theta": 5e5,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
    ),
    "mimo_v2_flash": (
        (
            "hybrid_layer_pattern", "moe_layer_freq", "layernorm_epsilon", "rope_theta", "partial_rotary_factor",
            "swa_rope_theta", "sliding_window_size", "swa_num_key_value_heads",
        ),
        {
            "layer_types": [
                "sliding_attention" if i > 0 and (i + 1) % 6 > 0 else "full_attention" for i in range(48)
            ],
            "mlp_layer_types": ["dense"] + ["sparse"] * 47, "rms_norm_eps": 1e-5, "sliding_window": 129,
            "rope_parameters": {
                "full_attention": {**DEFAULT, "rope_theta": 5e6, "partial_rotary_factor": 0.334},
                "sliding_attention": {**DEFAULT, "rope_theta": 1e4, "partial_rotary_factor": 0.334},
            },
        },
    ),
    "step3p5": (
        (
            "attention_other_setting", "moe_layers_enum", "moe_num_experts", "moe_top_k", "num_attention_groups",
            "partial_rotary_factors", "rope_scaling", "rope_theta",
        ),
        {
            "layer_types": ((["full_attention"] + ["sliding_attention"] * 3) * 12)[:45], "n_routed_experts": 288,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 42, "mtp_layer_types": ["sliding_attention"] * 3,
            "mtp_mlp_layer_types": ["dense"] * 3, "num_experts_per_tok": 8, "num_key_value_heads": 8,
            "num_sliding_attention_heads": 96, "query_pre_attn_scalar": 128, "hidden_act": "silu", "mlp_bias": False,
            "per_layer_config": {str(layer): {"num_attention_heads": 96} for layer in range(45) if layer % 4},
            "rope_parameters": {
                "full_attention": {
                    "factor": 2.0, "high_freq_factor": 32.0, "low_freq_factor": 1.0, "partial_rotary_factor": 0.5,
                    "original_max_position_embeddings": 131072, "rope_theta": 5e6, "rope_type": "llama3",
                },
                "sliding_attention": {**DEFAULT, "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            },
            "swiglu_limits": [0.0] * 43 + [7, 7], "swiglu_limits_shared": [0.0] * 44 + [16],
        },
    ),
}  # fmt: skip


def read(raw: dict[str, Any]) -> ModelConfig:
    return Fields(raw).read(FAMILIES[raw["model_type"]].read)


def changed(family: str, **fields: Any) -> ModelConfig:
    return read({**HUB[family], **fields})


def attended(config: ModelConfig, layer: int = 0) -> AttentionConfig:
    attention = config.layers[layer].attention
    assert isinstance(attention, AttentionConfig)
    return attention


def test_files_of_the_hub() -> None:
    qwen3, mixtral, qwen2 = (read(HUB[family]) for family in ("qwen3_moe", "mixtral", "qwen2_moe"))
    assert (len(qwen3.layers), qwen3.hidden, qwen3.max_positions) == (48, 2048, 40960)
    attention, moe = attended(qwen3), qwen3.layers[0].ffn
    assert (attention.heads, attention.kv_heads, attention.head_dim, attention.rope) == (32, 4, 128, RopeConfig(1e6))
    assert attention.qk_norm is QKNorm.HEAD
    assert not attention.bias
    assert moe == MoEConfig(experts=128, top_k=8, width=768, router=RouterConfig(norm=1))
    assert mixtral.layers[-1].ffn == MoEConfig(experts=8, top_k=2, width=14336, router=RouterConfig(norm=1))
    assert attended(mixtral).head_dim == 128
    assert attended(qwen2).bias
    assert isinstance(qwen2.layers[0].ffn, MoEConfig)
    assert qwen2.layers[0].ffn.shared is not None
    assert qwen2.layers[0].ffn.shared.width == 5632
    assert all(
        attended(config, i).window is None for config in (qwen3, mixtral, qwen2) for i in range(len(config.layers))
    )


def test_more_files_of_the_hub() -> None:
    glm, oss, phi, deepseek = (read(HUB[family]) for family in ("glm4_moe", "gpt_oss", "phimoe", "deepseek_v3"))
    assert [isinstance(layer.ffn, DenseConfig) for layer in glm.layers[:3]] == [True, False, False]
    assert attended(glm).rope == RopeConfig(1e6, width=64)
    assert [attended(oss, layer).window for layer in range(3)] == [128, None, 128]
    assert attended(oss).rope == RopeConfig(
        1.5e5, scaling=YarnScaling(32.0, 4096, 0.1 * math.log(32) + 1, 32, 1, False)
    )
    assert attended(phi).rope == RopeConfig(1e4, scaling=LongRopeScaling((2.0,) * 64, 1.25))
    latent = deepseek.layers[0].attention
    assert isinstance(latent, LatentAttentionConfig)
    assert latent.cached_widths == (64, 512)
    moe = deepseek.layers[3].ffn
    assert isinstance(moe, MoEConfig)
    limit = GroupLimit(groups=8, kept=4, score=GroupScore.BEST_TWO)
    assert moe.router == RouterConfig(Score.SIGMOID, selection_bias=True, limit=limit, norm=1, scale=2.5)
    assert all(read(HUB[family]).hidden for family in HUB)


def test_files_of_the_hub_whose_layers_differ() -> None:
    mimo = read(HUB["mimo_v2_flash"])
    assert [attended(mimo, layer).window for layer in range(7)] == [None, 129, 129, 129, 129, None, 129]
    full, slides = attended(mimo, 0), attended(mimo, 1)
    assert (full.kv_heads, slides.kv_heads, full.sinks, slides.sinks) == (4, 8, False, True)
    assert (full.rope, slides.rope) == (RopeConfig(5e6, width=64), RopeConfig(1e4, width=64))
    assert (slides.cached_widths, slides.value_scale) == ((192, 128), 0.707)
    llama = read(HUB["llama4"])
    assert llama == read(HUB["llama4_text"])
    assert [attended(llama, layer).window for layer in range(5)] == [8192, 8192, 8192, None, 8192]
    assert [attended(llama, layer).query_scaling for layer in (2, 3)] == [None, QueryScalingConfig(8192, 0.1)]
    assert [attended(llama, layer).qk_norm for layer in (2, 3)] == [QKNorm.ROTATED_UNIT, None]
    assert attended(llama, 0).rope == RopeConfig(5e5, interleaved=True, scaling=Llama3Scaling(16.0, 1.0, 1.0, 8192))
    assert attended(llama, 3).rope is None
    step = read(HUB["step3p5"])
    assert read({"model_type": "step3p7", "text_config": HUB["step3p5"]}) == step
    assert len(step.layers) == 45
    full, slides = attended(step, 0), attended(step, 1)
    assert (full.heads, slides.heads, full.window, slides.window) == (64, 96, None, 512)
    assert full.rope == RopeConfig(5e6, width=64, scaling=Llama3Scaling(2.0, 1.0, 32.0, 131072))
    assert slides.rope == RopeConfig(1e4)
    assert (step.layers[2].ffn, step.norm) == (DenseConfig(11264), Norm.RMS_AROUND_ONE)
    moes = [layer.ffn for layer in step.layers[3:] if isinstance(layer.ffn, MoEConfig)]
    assert {moe.router for moe in moes} == {RouterConfig(Score.SIGMOID, selection_bias=True, norm=1, scale=3.0)}
    assert [moe.activation for moe in moes] == [SwiGLUConfig()] * 40 + [LimitedSwiGLUConfig(7)] * 2
    shared = [moe.shared.activation for moe in moes if moe.shared is not None]
    assert shared == [SwiGLUConfig()] * 41 + [LimitedSwiGLUConfig(16)]
    ling, sarvam, latent = (read(HUB[family]) for family in ("bailing_moe", "sarvam_moe", "sarvam_mla"))
    assert attended(ling) == AttentionConfig(16, 4, 128, RopeConfig(6e5, width=64), qk_norm=QKNorm.HEAD)
    assert attended(sarvam).rope == RopeConfig(8e6)
    limits = [GroupLimit(8, 4, GroupScore.BEST_TWO), None, GroupLimit(16, 2, GroupScore.BEST_TWO)]
    routers = [RouterConfig(Score.SIGMOID, selection_bias=True, limit=limit, norm=1, scale=2.5) for limit in limits]
    moes = [config.layers[1].ffn for config in (ling, sarvam, latent)]
    assert [moe.router for moe in moes if isinstance(moe, MoEConfig)] == routers
    few = read(HUB["llama4_text"] | {"interleave_moe_layer_step": 2})
    assert [isinstance(layer.ffn, MoEConfig) for layer in few.layers[:4]] == [False, True, False, True]


def test_models_that_decode_blocks() -> None:
    """They are those that they were made of, but for what rows see."""
    for family, base, block, mask, named in (
        ("llada2_moe", "bailing_moe", 32, 156895, {}),
        ("sdar_moe", "qwen3_moe", 4, 151669, {"fuse_cross_entropy": True, "debug": False}),
    ):
        fields = HUB.get(family) or HUB[base] | named | {"model_type": family}
        config = read(fields)
        assert config.diffusion == BlockDiffusion(block, mask)
        other = read(fields | {"block_size": 8, "mask_token_id": 7})
        assert other.diffusion == BlockDiffusion(8, 7)
        assert attended(other) == replace(attended(config), block=8)
        plain = {name: value for name, value in fields.items() if name not in named} | {"model_type": base}
        assert [replace(layer, attention=attended(read(plain))) for layer in config.layers] == list(read(plain).layers)
        assert replace(attended(config), block=1) == attended(read(plain))


def test_dense_layers_and_windows() -> None:
    config = changed("qwen3_moe", mlp_only_layers=[2], decoder_sparse_step=2, num_hidden_layers=6)
    kinds = ["dense" if isinstance(layer.ffn, DenseConfig) else "moe" for layer in config.layers]
    assert kinds == ["dense", "moe", "dense", "moe", "dense", "moe"]
    assert attended(changed("mixtral", sliding_window=4096), 7).window == 4096
    assert attended(changed("qwen3_moe", sliding_window=64, use_sliding_window=True)).window == 64
    kinds = ["sliding_attention", "full_attention"] * 12
    config = changed("qwen2_moe", use_sliding_window=True, layer_types=kinds)
    assert [attended(config, layer).window for layer in range(24)] == [32768, None] * 12


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mixtral", {"logit_softcapping": 30.0}, "fields not understood.*logit_softcapping"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3_moe", {"rope_scaling": {"type": "proportional"}}, "rotary embedding of type 'proportional'"),
        ("qwen3_moe", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ("qwen3_moe", {"rope_scaling": {"type": "yarn", "depth": 2}}, "fields not understood.*rope_scaling.depth"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.low_freq_factor is missing"),
        (
            "qwen3_moe",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "64 frequencies need 64 factors, got 1",
        ),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window needs layer_types"),
        ("mixtral", {"hidden_size": "large"}, "hidden_size must be of type int, got 'large'"),
        ("mixtral", {"num_hidden_layers": True}, "num_hidden_layers must be of type int, got True"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads must be positive and finite, got 0"),
        ("mixtral", {"rope_theta": math.inf}, "rope_theta must be positive and finite, got inf"),
        ("mixtral", {"rope_parameters": "yarn"}, "rope_parameters must be an object, got 'yarn'"),
        (
            "mixtral",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
            "rope_scaling and rope_parameters are two descriptions of one thing",
        ),
        ("qwen3_moe", {"mlp_only_layers": ["first"]}, r"mlp_only_layers must be a list of int, got \['first'\]"),
        ("mixtral", {"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads"),
        ("llama4", {"text_config": None}, "text_config.hidden_size is missing"),
        ("llama4", {"text_config": HUB["llama4_text"] | {"depth": 2}}, "fields not understood.*text_config.depth"),
        ("llama4", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported"),
        ("llama4_text", {"no_rope_layers": [2]}, "no_rope_layers must say 0 or 1 for each of 48 layers"),
        ("llama4_text", {"layer_types": ["sliding_attention"]}, "layer_types must say chunked_attention or full_att"),
        ("mimo_v2_flash", {"moe_layer_freq": [0, 2]}, r"moe_layer_freq must say 0 or 1 for each layer, got \[0, 2\]"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0]}, "layer_types must say .* for each of 48 layers"),
        ("mimo_v2_flash", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.full_attention.rope_theta is mis"),
        ("bailing_moe", {"score_function": "softmax"}, "score_function='softmax' is not supported"),
        ("bailing_moe", {"use_qkv_bias": True}, "use_qkv_bias=True is not supported"),
        (
            "sarvam_mla",
            {"moe_router_enable_expert_bias": False},
            "moe_router_enable_expert_bias=False is not supported",
        ),
        ("step3p5", {"swiglu_limits": [1.0] * 44}, "swiglu_limits must say a number for each of 45 layers"),
        ("step3p5", {"moe_layers_enum": "3-44"}, "moe_layers_enum must be numbers of layers, got '3-44'"),
        ("step3p5", {"use_rope_layers": [0, 1]}, r"use_rope_layers=\[0, 1\] is not supported"),
        ("step3p5", {"per_layer_config": {"0": {"num_attention_heads": 32}}}, "per_layer_config=.* is not supported"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k 9 exceeds the number of experts, 8"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(family, **fields)


def test_all_problems_are_told_at_once() -> None:
    raw = {**HUB["mixtral"], "hidden_act": "relu", "sparsity": 2, "attn_temperature": 3}
    del raw["vocab_size"]
    with pytest.raises(ConfigError) as caught:
        read(raw)
    for words in ("hidden_act='relu'", "sparsity", "attn_temperature", "vocab_size is missing"):
        assert words in str(caught.value)


@pytest.mark.parametrize("family", HUB)
def test_no_value_of_a_field_gives_another_error(family: str) -> None:
    odd = (None, "x", -1, 0, 1.5, True, [], [None], ["x"], {}, {"x": 1}, 1e30, math.nan)
    for name, value in itertools.product([*HUB[family], "rope_parameters", "layer_types"], odd):
        if name != "model_type":
            with contextlib.suppress(ConfigError):
                changed(family, **{name: value})


def test_new_and_old_spellings_of_the_rope_base() -> None:
    old = changed("qwen3_moe", rope_theta=5e5)
    raw = {**HUB["qwen3_moe"], "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del raw["rope_theta"]
    assert read(raw) == old


@pytest.mark.parametrize("family", REWRITTEN)
def test_what_transformers_makes_of_a_file_of_the_hub_is_the_same(family: str) -> None:
    left_out, written = REWRITTEN[family]
    raw = {name: value for name, value in HUB[family].items() if name not in left_out}
    assert read(raw | written) == read(HUB[family])


def test_goldens_are_read() -> None:
    for path in (Path(__file__).parents[1] / "goldens").glob("*/config.json"):
        assert read(json.loads(path.read_text())).hidden > 0
