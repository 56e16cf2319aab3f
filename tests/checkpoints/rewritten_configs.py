"""Configs as transformers 5 rewrites those of the hub, by model type."""

from __future__ import annotations

from typing import Any

DEFAULT = {"rope_type": "default"}
REWRITTEN: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
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
"""The fields of the hub's config that transformers leaves out, and those that it writes instead."""
