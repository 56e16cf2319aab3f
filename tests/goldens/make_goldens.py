"""Make the golden checkpoints: tiny random models with the logits that Hugging Face transformers computes.

    pip install torch==2.13.0 transformers==5.23
    python tests/goldens/make_goldens.py              # every case
    python tests/goldens/make_goldens.py CASE ...     # only these cases

Each case is a folder next to this script. It holds the checkpoint as `save_pretrained` writes it, without
`generation_config.json`, and `reference.npz`:

    prompts        int32   [P, L]     token ids, padded on the right with -1
    prompt_logits  float32 [P, L, V]  logits of every prompt position, 0 beyond the prompt
    tokens         int32   [P, S]     greedy continuation
    token_logits   float32 [P, S, V]  the logits whose argmax is that token (step 0 is the last prompt position)
    seed           int64   []         seed of the weights and the prompts

The logits are computed in float32, one prompt at a time, without padding and with eager attention. A seed is accepted
only if rounding differences between implementations can change neither a token nor the choice of an expert.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).parent
PROMPT_LENGTHS = (5, 1, 12, 3, 9, 2)
STEPS = 8
WEIGHT_GAIN = 1.5  # weights are randn * gain / sqrt(fan_in)
MIN_TOKEN_GAP = 1e-3  # best to second-best logit, relative to the largest absolute logit
MIN_ROUTER_GAP = 1e-3  # k-th to (k+1)-th router logit
TEXT = "text_config"
VISION = ("vision_model.", "multi_modal_projector.", "vit_large_projector.")
SELECTION_BIAS = "e_score_correction_bias"
NORMS_AROUND_ZERO = ("qwen3_next", "qwen3_5_moe_text", "step3p7")  # one is added to their weights
GIVES_ROUTER_LOGITS = ("qwen3_moe", "qwen2_moe", "mixtral")  # other families return them in other forms
NUDGE, MAX_CHANGE = 1e-4, 2e-2  # relative: of the embeddings, and of the logits while the experts stay the same
MAX_ROUNDING = 8e-6  # difference of decoding with and without a cache, relative to the largest absolute logit
MIN_CONTEXT_EFFECT = 0.5  # change of a logit when the context is dropped, relative to the spread of the logits


# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe_gqa4_e8_top2": {
        "model_type": "qwen3_moe", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe_gqa8_e16_top4_sparse_step": {  # dense, dense, dense, sparse
        "model_type": "qwen3_moe", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8,
        "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 8, "norm_topk_prob": False,
        "decoder_sparse_step": 2, "mlp_only_layers": [1], "intermediate_size": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3_moe_gqa2_e12_top1_dense": {  # sparse, dense, sparse
        "model_type": "qwen3_moe", "vocab_size": 113, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "num_experts": 12, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "norm_topk_prob": False,
        "mlp_only_layers": [1], "intermediate_size": 40, "rms_norm_eps": 0.02,
    },
    "qwen3_moe_gqa1_e6_top2_window": {
        "model_type": "qwen3_moe", "vocab_size": 104, "hidden_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8,
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True,
        "use_sliding_window": True, "sliding_window": 5,
    },
    "qwen2_moe_gqa1_e4_top2": {
        "model_type": "qwen2_moe", "vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 24, "rms_norm_eps": 0.02,
    },
    "qwen2_moe_gqa2_e8_top4_sparse_step": {  # dense, sparse
        "model_type": "qwen2_moe", "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 8, "norm_topk_prob": True,
        "shared_expert_intermediate_size": 16, "tie_word_embeddings": True,
        "decoder_sparse_step": 2, "intermediate_size": 24,
    },
    "qwen2_moe_gqa4_e12_top2_window": {  # attention: window, full, full
        "model_type": "qwen2_moe", "vocab_size": 103, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1,
        "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 16, "qkv_bias": False,
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "mixtral_gqa1_e4_top2": {
        "model_type": "mixtral", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8,
    },
    "mixtral_gqa2_e6_top1_window": {
        "model_type": "mixtral", "vocab_size": 160, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size": 24,
        "sliding_window": 4, "rms_norm_eps": 0.02,
    },
    "mixtral_gqa8_e16_top4_sharded": {
        "model_type": "mixtral", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16,
        "num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 8,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "olmoe_gqa2_e8_top2_clip": {
        "model_type": "olmoe", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "clip_qkv": 1.0,
        "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8, "norm_topk_prob": False,
        "pad_token_id": None,
    },
    "olmoe_gqa8_e8_top3": {
        "model_type": "olmoe", "vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 1,
        "num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 8, "norm_topk_prob": True,
        "pad_token_id": None, "tie_word_embeddings": True,
    },
    "granitemoe_gqa2_e8_top3": {
        "model_type": "granitemoe", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4,
        "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 16, "tie_word_embeddings": True,
        "embedding_multiplier": 0.3, "logits_scaling": 0.5, "residual_multiplier": 1.3, "attention_multiplier": 0.4,
    },
    "granitemoe_gqa4_e4_top2_bias": {
        "model_type": "granitemoe", "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True,
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8,
    },
    "glm4_moe_gqa2_e8_top2_groups": {  # dense, sparse, sparse
        "model_type": "glm4_moe", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
        "intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    },
    "glm4_moe_gqa8_e8_top3_qk_norm": {  # dense, sparse
        "model_type": "glm4_moe", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16, "use_qk_norm": True,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "n_shared_experts": 2,
        "intermediate_size": 24, "norm_topk_prob": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
    },
    "hy_v3_gqa2_e8_top2": {  # dense, sparse
        "model_type": "hy_v3", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_shared_experts": 2,
        "intermediate_size": 24,
    },
    "hunyuan_v1_moe_gqa2_e8_alpha": {
        "model_type": "hunyuan_v1_moe", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "moe_topk": [2, 3],
        "num_experts": 8, "intermediate_size": 8, "tie_word_embeddings": True, "pad_token_id": None,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 100.0},
    },
    "hunyuan_v1_moe_gqa1_e8_top1_bias": {
        "model_type": "hunyuan_v1_moe", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "moe_topk": 1, "attention_bias": True,
        "num_experts": 8, "intermediate_size": 8, "pad_token_id": None,
    },
    "minimax_m2_gqa2_e8_top2": {
        "model_type": "minimax_m2", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "rotary_dim": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16,
    },
    "ernie4_5_moe_gqa2_e8_top3": {  # dense, sparse, dense, sparse
        "model_type": "ernie4_5_moe", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "pad_token_id": None, "moe_layer_interval": 2,
        "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 8, "moe_num_shared_experts": 2,
        "intermediate_size": 24, "moe_layer_start_index": 1,
    },
    "exaone_moe_gqa2_e8_top2_groups": {  # attention: window, full, window; dense, sparse, sparse
        "model_type": "exaone_moe", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": None,
        "sliding_window": 4, "sliding_window_pattern": 2,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_shared_experts": 1,
        "intermediate_size": 24, "n_group": 2, "topk_group": 1,
    },
    "gpt_oss_gqa2_e8_top2_yarn": {  # attention: window, full
        "model_type": "gpt_oss", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "sliding_window": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8, "swiglu_limit": 2.0,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 16, "rope_theta": 100.0,
        },
    },
    "gpt_oss_gqa8_e4_top3": {
        "model_type": "gpt_oss", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": False,
        "num_local_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 8,
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "dbrx_gqa2_e8_top2_clip": {
        "model_type": "dbrx", "vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 8,
        "attn_config": {"clip_qkv": 1.0, "kv_n_heads": 4, "rope_theta": 5e5},
        "ffn_config": {"ffn_hidden_size": 8, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dbrx_gqa8_e4_top3_norm2": {
        "model_type": "dbrx", "vocab_size": 70, "d_model": 64, "n_layers": 2, "n_heads": 8,
        "attn_config": {"clip_qkv": 100.0, "kv_n_heads": 1, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 8, "moe_num_experts": 4, "moe_top_k": 3, "moe_normalize_expert_weights": 2.0,
        },
    },
    "phimoe_gqa2_e8_bias": {
        "model_type": "phimoe", "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True, "lm_head_bias": True,
        "num_local_experts": 8, "intermediate_size": 8, "router_jitter_noise": 0.3,
    },
    "phimoe_gqa4_e4_longrope": {
        "model_type": "phimoe", "vocab_size": 70, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2,
        "num_local_experts": 4, "intermediate_size": 8, "router_jitter_noise": 0.3, "sliding_window": 6,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 100.0, "short_mscale": 1.2, "long_mscale": 1.3,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 8.0, 16.0],
        },
    },
    "deepseek_v2_e8_top3": {  # dense, sparse
        "model_type": "deepseek_v2", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "q_lora_rank": None, "kv_lora_rank": 12,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "n_shared_experts": 2,
        "intermediate_size": 24, "first_k_dense_replace": 1,
    },
    "deepseek_v2_e8_top2_groups_yarn": {
        "model_type": "deepseek_v2", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "q_lora_rank": 16, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
        "intermediate_size": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 3.0,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 0.7,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "rope_theta": 100.0,
        },
    },
    "deepseek_v3_e8_top2_groups_yarn": {  # dense, sparse
        "model_type": "deepseek_v3", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 16, "kv_lora_rank": 12,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
        "intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16, "rope_theta": 100.0,
        },
    },
    "deepseek_v3_e4_top2_halves": {  # sparse, sparse
        "model_type": "deepseek_v3", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": None, "kv_lora_rank": 12,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 8, "rope_interleave": False,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "attention_bias": True, "norm_topk_prob": False,
    },
    "mimo_v2_flash_gqa4_e8_top2": {  # attention: full, window, window, full; dense, sparse, sparse, sparse
        "model_type": "mimo_v2_flash", "vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12, "v_head_dim": 8, "sliding_window": 4,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 16,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.334},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.334},
        },
    },
    "mimo_v2_flash_gqa8_e8_top2_groups_bias": {  # attention: window, full; sparse, sparse
        "model_type": "mimo_v2_flash", "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 6, "v_head_dim": 10, "sliding_window": 5,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 16,
        "layer_types": ["sliding_attention", "full_attention"], "mlp_layer_types": ["sparse", "sparse"],
        "n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5,
        "attention_value_scale": None, "attention_bias": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.67},
        },
    },
    "llama4_text_gqa2_e8_top1": {  # attention: chunks, full, chunks, full; dense, sparse, dense, sparse
        "model_type": "llama4_text", "vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "no_rope_layer_interval": 2,
        "attention_chunk_size": 4, "floor_scale": 3, "attn_scale": 0.7, "interleave_moe_layer_step": 2,
        "num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size": 8, "intermediate_size_mlp": 16,
    },
    "llama4_gqa4_e4_top2_bias": {  # attention: chunks, chunks, full; all sparse
        "model_type": "llama4",
        "text_config": {
            "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 8, "no_rope_layers": [1, 1, 0], "attention_chunk_size": 6,
            "attn_temperature_tuning": False, "use_qk_norm": False, "attention_bias": True,
            "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 8, "intermediate_size_mlp": 16,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 1.0, "original_max_position_embeddings": 16,
            },
        },
        "vision_config": {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
            "image_size": 4, "patch_size": 2, "vision_output_dim": 8, "projector_input_dim": 8,
            "projector_output_dim": 8,
        },
    },
    "qwen3_next_e8_top2": {  # attention: three delta nets, full; fewer key heads than value heads
        "model_type": "qwen3_next", "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 4,
        "rms_norm_eps": 0.01,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_next_e4_top3_sparse_step": {  # attention: full, two delta nets; dense, sparse, dense
        "model_type": "qwen3_next", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "linear_conv_kernel_dim": 3,
        "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 4, "linear_value_head_dim": 8,
        "layer_types": ["full_attention", "linear_attention", "linear_attention"], "decoder_sparse_step": 2,
        "intermediate_size": 24, "norm_topk_prob": False, "tie_word_embeddings": True, "rms_norm_eps": 0.02,
        "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    },
    "step3p7_gqa4_e8_top2": {  # attention: full, window, window, full; dense, sparse, sparse, sparse
        "model_type": "step3p7",
        "text_config": {
            "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 8, "num_sliding_attention_heads": 16, "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "share_expert_dim": 16,
            "intermediate_size": 16, "moe_router_scaling_factor": 2.0, "swiglu_limits": [0.0, 0.0, 0.2, 0.3],
            "swiglu_limits_shared": [0.3, 0.0, 0.2, 0.0],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "llama3", "rope_theta": 1000.0, "partial_rotary_factor": 0.5, "factor": 2.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 1.0},
            },
        },
        "vision_config": {
            "hidden_size": 8, "mlp_ratio": 1.0, "num_hidden_layers": 1, "num_attention_heads": 1,
            "image_size": 8, "patch_size": 4,
        },
    },
    "step3p5_gqa8_e4_top3": {  # attention: full, window; sparse, dense; fields as the hub has them, one layer too many
        "model_type": "step3p7",
        "text_config": {
            "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
            "num_attention_heads": 8, "num_attention_groups": 1, "head_dim": 12, "sliding_window": 6,
            "attention_other_setting": {
                "attention_type": "sliding_attention", "num_attention_heads": 16, "num_attention_groups": 1,
                "head_dim": 12, "true_head_dim": 12,
            },
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "moe_layers_enum": "0,2",
            "moe_num_experts": 4, "moe_top_k": 3, "moe_intermediate_size": 8, "share_expert_dim": 8,
            "intermediate_size": 16, "moe_router_scaling_factor": 1.5, "swiglu_limits": [0.3, 0.0, 0.0],
            "swiglu_limits_shared": [0.0, 0.2, 0.0], "rope_theta": [5000.0, 100.0, 100.0],
            "partial_rotary_factors": [0.5, 1.0, 1.0], "yarn_only_types": ["full_attention"],
            "rope_scaling": {
                "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0,
                "original_max_position_embeddings": 16,
            },
            "use_head_wise_attn_gate": True, "use_moe_router_bias": True, "moe_router_activation": "sigmoid",
        },
        "vision_config": {
            "hidden_size": 8, "mlp_ratio": 1.0, "num_hidden_layers": 1, "num_attention_heads": 1,
            "image_size": 8, "patch_size": 4,
        },
    },
    "qwen3_5_moe_text_e8_top2": {  # attention: three delta nets, full; fewer key heads than value heads
        "model_type": "qwen3_5_moe_text", "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
        "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 4,
        "rms_norm_eps": 0.01,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
        },
    },
    "qwen3_5_moe_text_e4_top3": {  # attention: full, delta net
        "model_type": "qwen3_5_moe_text", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "linear_conv_kernel_dim": 2,
        "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 4, "linear_value_head_dim": 8,
        "layer_types": ["full_attention", "linear_attention"], "tie_word_embeddings": True, "rms_norm_eps": 0.02,
        "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    },
    "jamba_e8_top2": {  # Mamba, attention, Mamba, attention; dense, sparse, dense, sparse
        "model_type": "jamba", "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "pad_token_id": None,
        "mamba_d_state": 4, "mamba_dt_rank": 6,
    },
    "jamba_e4_top3_bias": {  # attention, Mamba, Mamba; sparse, dense, sparse
        "model_type": "jamba", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 1, "attn_layer_period": 3, "attn_layer_offset": 0,
        "expert_layer_offset": 0, "num_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 8,
        "mamba_d_state": 3, "mamba_d_conv": 2, "mamba_expand": 1, "mamba_conv_bias": False, "mamba_proj_bias": True,
        "pad_token_id": None, "tie_word_embeddings": True,
    },
    "bailing_hybrid_e8_top2": {  # delta, latent, delta; dense, sparse, sparse
        "model_type": "bailing_hybrid", "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 6, "layer_group_size": 2,
        "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "rope_theta": 100.0,
        "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 2,
        "intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
        "num_mtp_layers": 0, "pad_token_id": None, "rms_norm_eps": 0.02,
    },
    "bailing_hybrid_e4_top2_softplus": {  # latent, delta
        "model_type": "bailing_hybrid", "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4, "short_conv_kernel_size": 3,
        "layer_types": ["full_attention", "linear_attention"], "kda_safe_gate": False,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 4, "norm_topk_prob": False,
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0, "pad_token_id": None,
    },
}
# fmt: on
MULTIMODAL = {"qwen3_5_moe_e4_top3": "qwen3_5_moe_text_e4_top3"}
"""Cases in the hub's form, made from another case: a language model within a multimodal checkpoint, fused experts."""
SHARD_SIZES = {"mixtral_gqa8_e16_top4_sharded": "60KB"}  # the others are one file


COMMON = {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
TEXT_ALONE = {"step3p5_gqa8_e4_top3": "step3p5"}
"""Cases whose config.json is that of the language model, with a model type that transformers has no class for."""


def auto_class(settings: dict[str, Any]) -> type:
    """Return the transformers class that builds the model, which may be multimodal."""
    return AutoModelForImageTextToText if TEXT in settings else AutoModelForCausalLM


def build_model(settings: dict[str, Any]) -> PreTrainedModel:
    """Build a model with random parameters, norms and biases included, from torch's generator."""
    if TEXT in settings:
        config = AutoConfig.for_model(**{**settings, TEXT: {**settings[TEXT], **COMMON}})
    else:
        config = AutoConfig.for_model(**settings, **COMMON)
    model = auto_class(settings).from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith(SELECTION_BIAS):
            parameter.copy_(0.1 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.5 * noise)
        elif name.endswith("A_log"):
            parameter.copy_(0.5 * noise - 1)  # a state lasts for some positions
        elif parameter.ndim == 1:
            around = 0 if settings["model_type"] in NORMS_AROUND_ZERO and "linear_attn.norm" not in name else 1
            parameter.copy_(around + 0.3 * noise)
        else:
            parameter.copy_(WEIGHT_GAIN * noise / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(SELECTION_BIAS):
            buffer.copy_(0.1 * torch.randn(buffer.shape))
    return model


def greedy(model: PreTrainedModel, prompt: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prompt with its greedy continuation, and the logits of each new token."""
    sequence, chosen_by = prompt, []
    cache = DynamicCache(config=model.config.get_text_config()) if use_cache else None
    for step in range(STEPS):
        fed = sequence[-1:] if use_cache and step else sequence
        logits = model(fed[None], past_key_values=cache, use_cache=use_cache).logits[0, -1]
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)])
        chosen_by.append(logits)
    return sequence, torch.stack(chosen_by)


def compute_reference(model: PreTrainedModel, prompts: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """Return the arrays of `reference.npz` without the seed.

    Decoding with and without a cache must agree: they differ by rounding, of which the tests allow only a little more.
    """
    rows, length, vocab = len(prompts), max(map(len, prompts)), model.config.get_text_config().vocab_size
    reference = {
        "prompts": np.full((rows, length), -1, np.int32),
        "prompt_logits": np.zeros((rows, length, vocab), np.float32),
        "tokens": np.zeros((rows, STEPS), np.int32),
        "token_logits": np.zeros((rows, STEPS, vocab), np.float32),
    }
    for row, prompt in enumerate(prompts):
        sequence, logits = greedy(model, prompt, use_cache=False)
        cached_sequence, cached_logits = greedy(model, prompt, use_cache=True)
        assert torch.equal(sequence, cached_sequence), "the cache changes a greedy token"
        difference = (cached_logits - logits).abs().max() / logits.abs().max()
        assert difference <= MAX_ROUNDING, "rounding changes the logits"
        reference["prompts"][row, : len(prompt)] = prompt
        reference["prompt_logits"][row, : len(prompt)] = model(prompt[None]).logits[0]
        reference["tokens"][row] = sequence[len(prompt) :]
        reference["token_logits"][row] = logits
    return reference


def find_faults(model: PreTrainedModel, prompts: list[torch.Tensor], reference: dict[str, np.ndarray]) -> Iterator[str]:
    """Yield the faults of a model as a golden: near-ties, flat logits, unused experts, context without effect."""
    logits = reference["token_logits"]
    first, second = np.sort(logits)[..., :-3:-1].transpose(2, 0, 1)
    if ((first - second) / np.abs(logits).max(-1)).min() <= MIN_TOKEN_GAP:
        yield "two next tokens nearly tie"
    if logits.std() < 1:
        yield "the logits hardly spread"
    if min(len(set(row)) for row in reference["tokens"].tolist()) < STEPS // 2:
        yield "a continuation hardly varies"
    for prompt, with_context in zip(prompts, logits[:, 0], strict=False):
        without_context = model(prompt[None, -1:]).logits[0, 0].numpy()
        if len(prompt) > 1 and np.abs(with_context - without_context).mean() < MIN_CONTEXT_EFFECT * logits.std():
            yield "dropping the context hardly changes the logits"
    if model.config.model_type in GIVES_ROUTER_LOGITS:
        yield from find_router_faults(model, prompts, reference["tokens"])
    else:
        yield from find_jumps(model, prompts, reference["tokens"])


def find_router_faults(model: PreTrainedModel, prompts: list[torch.Tensor], tokens: np.ndarray) -> Iterator[str]:
    """Yield the faults of the expert choices in all prompts and continuations, layer by layer."""
    top_k = model.config.num_experts_per_tok
    sequences = [torch.cat([prompt, torch.from_numpy(row)]) for prompt, row in zip(prompts, tokens, strict=False)]
    outputs = [model(sequence[None], output_router_logits=True).router_logits for sequence in sequences]
    for layer in map(torch.cat, zip(*outputs, strict=False)):
        ranked, experts = layer.sort(-1, descending=True)
        if (ranked[:, top_k - 1] - ranked[:, top_k]).min() <= MIN_ROUTER_GAP:
            yield "two experts nearly tie"
        if 2 * len(experts[:, :top_k].unique()) < layer.shape[-1]:
            yield "less than half of the experts are used"


def find_jumps(model: PreTrainedModel, prompts: list[torch.Tensor], tokens: np.ndarray) -> Iterator[str]:
    """Yield a fault if a nudge of the embeddings makes the logits jump: two experts nearly tie."""
    sequences = [torch.cat([prompt, torch.from_numpy(row)]) for prompt, row in zip(prompts, tokens, strict=False)]
    before = [model(sequence[None]).logits for sequence in sequences]
    embedding = model.get_input_embeddings().weight
    held = embedding.clone()
    for _ in range(4):
        embedding.copy_(held * (1 + NUDGE * torch.randn(held.shape)))
        after = [model(sequence[None]).logits for sequence in sequences]
        if any((a - b).abs().max() > MAX_CHANGE * b.abs().max() for a, b in zip(after, before, strict=True)):
            yield "a nudge makes the logits jump"
    embedding.copy_(held)


def drop_vision(file: Path) -> None:
    """Remove the tensors of the vision model from a file."""
    if not file.exists():
        return
    tensors = load_file(file)
    of_text = {name: tensor for name, tensor in tensors.items() if not name.startswith(VISION)}
    if len(of_text) < len(tensors):
        save_file(of_text, file, metadata={"format": "pt"})


def make_case(name: str) -> int:
    """Write the checkpoint and the reference of the first seed without faults, and return that seed."""
    folder = HERE / name
    for seed in count():
        torch.manual_seed(seed)
        model = build_model(CASES[name])
        prompts = [torch.randint(model.config.get_text_config().vocab_size, (length,)) for length in PROMPT_LENGTHS]
        try:
            reference = compute_reference(model, prompts)
        except AssertionError:
            print(f"{name}: not seed {seed}, the cache changes the logits or a token")
            continue
        fault = next(find_faults(model, prompts, reference), None)
        if fault is None:
            break
        print(f"{name}: not seed {seed}, {fault}")
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZES.get(name, "1GB"))
    (folder / "generation_config.json").unlink()
    saved = auto_class(CASES[name]).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    for key, array in compute_reference(saved, prompts).items():
        np.testing.assert_allclose(array, reference[key], rtol=1e-4, atol=1e-4, err_msg=f"{key} differ once saved")
    drop_vision(folder / "model.safetensors")
    if name in TEXT_ALONE:
        described = {"model_type": TEXT_ALONE[name], "dtype": "float32", **CASES[name][TEXT], **COMMON}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    np.savez_compressed(folder / "reference.npz", **reference, seed=seed)
    return seed


def make_multimodal(name: str) -> None:
    """Write a case of `MULTIMODAL`, with the reference of the case that it is made from."""
    folder, text = HERE / name, HERE / MULTIMODAL[name]
    tensors, config = load_file(text / "model.safetensors"), json.loads((text / "config.json").read_text())
    experts = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)_proj\.weight")
    parts: dict[str, dict[str, list[torch.Tensor]]] = {}
    for tensor in sorted((key for key in tensors if experts.fullmatch(key)), key=lambda key: int(key.split(".")[5])):
        layer, _, kind = experts.fullmatch(tensor).groups()
        parts.setdefault(layer, {}).setdefault(kind, []).append(tensors.pop(tensor))
    for layer, kinds in parts.items():
        gate, up, down = (torch.stack(kinds[kind]) for kind in ("gate", "up", "down"))
        tensors |= {f"{layer}.gate_up_proj": torch.cat([gate, up], dim=1), f"{layer}.down_proj": down}
    hub = {re.sub(r"^model\.", "model.language_model.", key): tensor for key, tensor in tensors.items()}
    whole = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": config,
        "tie_word_embeddings": config["tie_word_embeddings"], "dtype": "float32", "vision_config": {"depth": 1},
        "image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4,
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(whole, indent=2))
    shutil.copy(text / "reference.npz", folder)


def main(names: list[str]) -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    disable_progress_bar()
    for name in names or [*CASES, *MULTIMODAL]:
        if name in MULTIMODAL:
            make_multimodal(name)
            continue
        seed = make_case(name)
        size = sum(file.stat().st_size for file in (HERE / name).iterdir())
        print(f"{name}: seed {seed}, {size // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
