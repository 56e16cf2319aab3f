"""Configs of the hub and of transformers are read as the models they describe; all others are refused by name."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_configs import HUB
from rewritten_configs import REWRITTEN

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


def read(raw: dict[str, Any]) -> ModelConfig:
    return Fields(raw).read(FAMILIES[raw["model_type"]].read)


def changed(family: str, **fields: Any) -> ModelConfig:
    return read({**HUB[family], **fields})


def attended(config: ModelConfig, layer: int = 0) -> AttentionConfig:
    attention = config.layers[layer].attention
    assert isinstance(attention, AttentionConfig)
    return attention


def test_hub_configs() -> None:
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


def test_more_hub_configs() -> None:
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


def test_hub_configs_with_different_layers() -> None:
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


def test_block_diffusion_models() -> None:
    """They are their base models, except for the attention mask."""
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
        ("llama4_text", {"no_rope_layers": [2]}, "no_rope_layers must hold 0 or 1 for each of 48 layers"),
        ("llama4_text", {"layer_types": ["sliding_attention"]}, "layer_types must hold chunked_attention or full_att"),
        ("mimo_v2_flash", {"moe_layer_freq": [0, 2]}, r"moe_layer_freq must hold 0 or 1 for each layer, got \[0, 2\]"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0]}, "layer_types must hold .* for each of 48 layers"),
        ("mimo_v2_flash", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.full_attention.rope_theta is mis"),
        ("bailing_moe", {"score_function": "softmax"}, "score_function='softmax' is not supported"),
        ("bailing_moe", {"use_qkv_bias": True}, "use_qkv_bias=True is not supported"),
        (
            "sarvam_mla",
            {"moe_router_enable_expert_bias": False},
            "moe_router_enable_expert_bias=False is not supported",
        ),
        ("step3p5", {"swiglu_limits": [1.0] * 44}, "swiglu_limits must hold a number for each of 45 layers"),
        ("step3p5", {"moe_layers_enum": "3-44"}, "moe_layers_enum must be numbers of layers, got '3-44'"),
        ("step3p5", {"use_rope_layers": [0, 1]}, r"use_rope_layers=\[0, 1\] is not supported"),
        ("step3p5", {"per_layer_config": {"0": {"num_attention_heads": 32}}}, "per_layer_config=.* is not supported"),
        ("mixtral", {"num_experts_per_tok": 9}, "top_k 9 exceeds the number of experts, 8"),
    ],
)
def test_unsupported_fields_and_values_are_refused_by_name(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed(family, **fields)


def test_all_problems_are_reported_at_once() -> None:
    raw = {**HUB["mixtral"], "hidden_act": "relu", "sparsity": 2, "attn_temperature": 3}
    del raw["vocab_size"]
    with pytest.raises(ConfigError) as caught:
        read(raw)
    for words in ("hidden_act='relu'", "sparsity", "attn_temperature", "vocab_size is missing"):
        assert words in str(caught.value)


@pytest.mark.parametrize("family", HUB)
def test_any_value_of_a_field_loads_or_raises_config_error(family: str) -> None:
    values = (None, "x", -1, 0, 1.5, True, [], [None], ["x"], {}, {"x": 1}, 1e30, math.nan)
    for name, value in itertools.product([*HUB[family], "rope_parameters", "layer_types"], values):
        if name != "model_type":
            with contextlib.suppress(ConfigError):
                changed(family, **{name: value})


def test_old_and_new_forms_of_rope_theta() -> None:
    old = changed("qwen3_moe", rope_theta=5e5)
    raw = {**HUB["qwen3_moe"], "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del raw["rope_theta"]
    assert read(raw) == old


@pytest.mark.parametrize("family", REWRITTEN)
def test_configs_rewritten_by_transformers_describe_the_same_model(family: str) -> None:
    left_out, written = REWRITTEN[family]
    raw = {name: value for name, value in HUB[family].items() if name not in left_out}
    assert read(raw | written) == read(HUB[family])


def test_configs_of_the_goldens() -> None:
    for path in (Path(__file__).parents[1] / "goldens").glob("*/config.json"):
        assert read(json.loads(path.read_text())).hidden > 0
