"""Configs and checkpoints of families with recurrent layers, in the hub's form and in that of transformers."""

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
from recurrent_hub_configs import HUB, QWEN3_5_TEXT
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


def full(config: ModelConfig, layer: int) -> AttentionConfig:
    attention = config.layers[layer].attention
    assert isinstance(attention, AttentionConfig)
    return attention


def test_gated_delta_nets() -> None:
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


def test_mamba() -> None:
    config = read(HUB["jamba"])
    mamba = MambaConfig(channels=8192, d_state=16, dt_rank=256, d_conv=4)
    assert [layer.attention == mamba for layer in config.layers[:8]] == [True] * 4 + [False] + [True] * 3
    assert [isinstance(layer.ffn, MoEConfig) for layer in config.layers[:4]] == [False, True, False, True]
    assert config.layers[1].ffn == MoEConfig(16, 2, 14336, RouterConfig())
    assert full(config, 4) == AttentionConfig(32, 8, 128, rope=None)
    assert read({**HUB["jamba"], "mamba_dt_rank": "auto", "num_experts": 1}) == replace(
        config, layers=tuple(replace(layer, ffn=config.layers[0].ffn) for layer in config.layers)
    )


def test_kimi_delta_attention() -> None:
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


def test_lightning_attention() -> None:
    config = read(HUB["bailing_moe_linear"])
    rope = RopeConfig(1e6, width=64)
    lightning = LightningConfig(
        16, 128, rope, qk_norm=True, norm_groups=4, scale=1 + 1 / 19 + 1e-5, scale_decrement=1 / 19
    )
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
        (
            "bailing_hybrid",
            {"kda_lower_bound": 5},
            "DecayConfig.floor must be the logarithm of a decay, between -1000 and 0, got 5",
        ),
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
            "layer_types must hold linear_attention or full_attention",
        ),
        ("qwen3_next", {"linear_num_key_heads": 5}, "32 heads cannot share 5 key heads evenly"),
        ("qwen3_next", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ("qwen3_5_moe_text", {"linear_gate": 1}, "fields not understood.*linear_gate"),
        ("qwen3_5_moe", {"text_config": {**QWEN3_5_TEXT, "gate": 1}}, "fields not understood.*text_config.gate"),
    ],
)
def test_unsupported_fields_and_values_are_refused_by_name(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read({**HUB[family], **fields})


@pytest.mark.parametrize("family", HUB)
def test_any_value_of_a_field_loads_or_raises_config_error(family: str) -> None:
    values = (None, "x", -1, 0, 1.5, True, [], [None], ["x"], {}, {"x": 1}, 1e30, math.nan)
    for name, value in itertools.product([*HUB[family], "rope_parameters", "layer_types"], values):
        if name != "model_type":
            with contextlib.suppress(ConfigError):
                read({**HUB[family], name: value})


def test_vision_tensors_are_ignored_and_experts_may_be_separate(tmp_path: Path) -> None:
    """The form in which transformers saves a checkpoint of the hub."""
    golden = GOLDENS / "qwen3_5_moe_e4_top3"
    stored = tensors(golden)
    for name in [name for name in stored if "mlp.experts." in name]:
        layer, fused = name.rsplit(".", 1)[0], stored.pop(name)
        for expert, both in enumerate(fused):
            parts = (
                {"gate": both[: len(both) // 2], "up": both[len(both) // 2 :]} if "gate_up" in name else {"down": both}
            )
            stored |= {f"{layer}.{expert}.{kind}_proj.weight": part.copy() for kind, part in parts.items()}
    stored |= {"model.visual.blocks.0.norm1.bias": np.zeros(2, np.float32), "mtp.norm.weight": np.zeros(2, np.float32)}
    path = tmp_path / "apart"
    path.mkdir()
    (path / "config.json").write_text((golden / "config.json").read_text())
    save_file(stored, path / "model.safetensors")
    assert_equal(load(path), load(golden))
    assert Checkpoint(path).config == Checkpoint(golden).config
    assert json.loads((golden / "config.json").read_text())["text_config"]["tie_word_embeddings"]
