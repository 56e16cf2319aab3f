"""Files of the families with recurrent layers: as the hub has them, and as transformers writes them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_checkpoint import assert_equal, load, tensors
from test_fields import read
from test_goldens import GOLDENS

from moe_jax.checkpoints import Checkpoint
from moe_jax.config import (
    AttentionConfig,
    DecayConfig,
    DeltaConfig,
    HeadGate,
    LatentAttentionConfig,
    LightningConfig,
    MambaConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    OutputGate,
    QKNorm,
    RopeConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_jax.errors import ConfigError

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


def full(config: ModelConfig, layer: int) -> AttentionConfig:
    attention = config.layers[layer].attention
    assert isinstance(attention, AttentionConfig)
    return attention


def test_gated_delta_nets_of_the_hub() -> None:
    following, before, whole = (read(HUB[family]) for family in ("qwen3_5_moe_text", "qwen3_next", "qwen3_5_moe"))
    assert whole == following
    for config in (following, before):
        delta = DeltaConfig(32, 16, 128, 128, 4, DecayConfig(each_channel=False), HeadGate.SILU)
        assert [config.layers[layer].attention == delta for layer in range(4)] == [True, True, True, False]
        attention = full(config, 3)
        assert (attention.rope, attention.qk_norm) == (RopeConfig(1e7, width=64), QKNorm.HEAD)
        assert (attention.output_gate, config.norm) == (OutputGate.CHANNEL, Norm.RMS_AROUND_ONE)
        shared = SharedExpertConfig(512, gated=True)
        experts, top_k = (256, 8) if config is following else (512, 10)
        assert config.layers[0].ffn == MoEConfig(experts, top_k, 512, RouterConfig(norm=1), shared)
        assert config.recurrent


def test_a_state_space_of_the_hub() -> None:
    config = read(HUB["jamba"])
    mamba = MambaConfig(channels=8192, d_state=16, dt_rank=256, d_conv=4)
    assert [layer.attention == mamba for layer in config.layers[:8]] == [True] * 4 + [False] + [True] * 3
    assert [isinstance(layer.ffn, MoEConfig) for layer in config.layers[:4]] == [False, True, False, True]
    assert config.layers[1].ffn == MoEConfig(16, 2, 14336, RouterConfig())
    assert full(config, 4) == AttentionConfig(32, 8, 128, rope=None)
    assert read({**HUB["jamba"], "mamba_dt_rank": "auto", "num_experts": 1}) == replace(
        config, layers=tuple(replace(layer, ffn=config.layers[0].ffn) for layer in config.layers)
    )


def test_kimi_delta_attention_of_the_hub() -> None:
    config = read(HUB["bailing_hybrid"])
    delta = DeltaConfig(32, 32, 128, 128, 4, DecayConfig(each_channel=True, floor=-5.0), HeadGate.SIGMOID)
    assert [layer.attention == delta for layer in config.layers] == [number % 6 < 5 for number in range(42)]
    latent = config.layers[5].attention
    assert isinstance(latent, LatentAttentionConfig)
    assert (latent.rope, latent.output_gate) == (RopeConfig(6e6, interleaved=True), OutputGate.HEAD)
    renamed = {
        {"n_group": "num_expert_group", "num_experts_per_tok": "num_experts_per_token"}.get(name, name): value
        for name, value in HUB["bailing_hybrid"].items()
    }
    assert read(renamed) == config
    unbounded = read({**HUB["bailing_hybrid"], "kda_safe_gate": False}).layers[0].attention
    assert isinstance(unbounded, DeltaConfig)
    assert unbounded.decay.floor is None


def test_lightning_attention_of_the_hub() -> None:
    config = read(HUB["bailing_moe_linear"])
    rope = RopeConfig(1e6, width=64)
    lightning = LightningConfig(16, 128, rope, qk_norm=True, norm_groups=4, scale=1 + 1 / 19 + 1e-5, fall=1 / 19)
    assert [layer.attention == lightning for layer in config.layers] == [number % 5 < 4 for number in range(20)]
    assert full(config, 4) == AttentionConfig(16, 4, 128, rope, qk_norm=QKNorm.HEAD)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bailing_hybrid", {"q_lora_rank": 256}, "q_lora_rank=256 is not supported"),
        (
            "bailing_hybrid",
            {"n_shared_experts": 2},
            "n_shared_experts and num_shared_experts are two names of one thing",
        ),
        (
            "bailing_hybrid",
            {"expert_swiglu_limit_list": [0, 4]},
            "expert_swiglu_limit_list limits what experts compute",
        ),
        ("bailing_hybrid", {"kda_lower_bound": "low"}, "kda_lower_bound must be a number, got 'low'"),
        ("bailing_hybrid", {"kda_lower_bound": 5}, "DecayConfig.floor is the logarithm of a decay, below 0, got 5"),
        ("bailing_moe_linear", {"kv_lora_rank": 512}, "fields not understood.*kv_lora_rank"),
        ("bailing_moe_linear", {"layer_group_size": 3}, "layer_group_size must divide num_hidden_layers"),
        ("bailing_moe_linear", {"head_dim": 64}, "head_dim=64 is not supported"),
        ("bailing_moe_linear", {"score_function": None}, "score_function is missing"),
        ("bailing_moe_linear", {"linear_silu": True}, "linear_silu=True is not supported"),
        ("bailing_moe_linear", {"group_norm_size": 3}, "16 heads do not make 3 groups"),
        (
            "jamba",
            {"attn_layer_offset": 8},
            "attn_layer_offset must be a number of layers, less than attn_layer_period",
        ),
        ("jamba", {"mamba_dt_rank": "half"}, "mamba_dt_rank must be of type int, got 'half'"),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention"]},
            "layer_types must say linear_attention or full_attention",
        ),
        ("qwen3_next", {"linear_num_key_heads": 5}, "32 heads cannot share 5 key heads evenly"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ("qwen3_5_moe_text", {"linear_gate": 1}, "fields not understood.*linear_gate"),
        ("qwen3_5_moe", {"text_config": {**QWEN3_5_TEXT, "gate": 1}}, "fields not understood.*text_config.gate"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read({**HUB[family], **fields})


@pytest.mark.parametrize("family", HUB)
def test_no_value_of_a_field_gives_another_error(family: str) -> None:
    odd = (None, "x", -1, 0, 1.5, True, [], [None], ["x"], {}, {"x": 1}, 1e30, math.nan)
    for name, value in itertools.product([*HUB[family], "rope_parameters", "layer_types"], odd):
        if name != "model_type":
            with contextlib.suppress(ConfigError):
                read({**HUB[family], name: value})


def test_a_vision_model_is_left_out_and_experts_may_be_apart(tmp_path: Path) -> None:
    """As transformers writes what it read from the hub."""
    golden = GOLDENS / "qwen3_5_moe_e4_top3"
    held = tensors(golden)
    for name in [name for name in held if "mlp.experts." in name]:
        layer, fused = name.rsplit(".", 1)[0], held.pop(name)
        for expert, both in enumerate(fused):
            parts = (
                {"gate": both[: len(both) // 2], "up": both[len(both) // 2 :]} if "gate_up" in name else {"down": both}
            )
            held |= {f"{layer}.{expert}.{kind}_proj.weight": part.copy() for kind, part in parts.items()}
    held |= {"model.visual.blocks.0.norm1.bias": np.zeros(2, np.float32), "mtp.norm.weight": np.zeros(2, np.float32)}
    path = tmp_path / "apart"
    path.mkdir()
    (path / "config.json").write_text((golden / "config.json").read_text())
    save_file(held, path / "model.safetensors")
    assert_equal(load(path), load(golden))
    assert Checkpoint(path).config == Checkpoint(golden).config
    assert json.loads((golden / "config.json").read_text())["text_config"]["tie_word_embeddings"]
