"""Fields that published configs have besides those of transformers: values that change nothing, and no others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.families import ALIASES, FAMILIES
from moe_jax.config import ModelConfig
from moe_jax.errors import ConfigError

GOLDENS = Path(__file__).parents[1] / "goldens"
QWEN3, NEXT, HUNYUAN, HY3 = (
    "qwen3_moe_gqa4_e8_top2", "qwen3_next_e8_top2", "hunyuan_v1_moe_gqa2_e8_alpha", "hy_v3_gqa2_e8_top2"
)  # fmt: skip
NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (QWEN3, {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}),
    (QWEN3, {"hidden_act": "swish", "tokenizer_class": "Qwen2Tokenizer", "torchscript": False, "pruned_heads": {}}),
    (QWEN3, {"unsloth_fixed": True, "is_moe": True, "cache_implementation": None, "unknown": None, "top_k": 50}),
    (QWEN3, {"do_sample": True, "temperature": 0.6, "max_length": 20, "num_beams": 1, "bad_words_ids": None}),
    (NEXT, {"use_sliding_window": False}),
    ("phimoe_gqa2_e8_bias", {"expert_dropout": 0.1}),
    ("llada2_moe_gqa4_e8_top2_groups", {"using_split_qkv_in_self_attention": False}),
    ("jamba_e8_top2", {"mamba_inner_layernorms": True}),
    ("exaone_moe_gqa2_e8_top2_groups", {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
    (HY3, {"qk_norm": True, "route_norm": True, "use_grouped_mm": True, "enable_lm_head_fp32": True}),
    (HY3, {"moe_router_use_sigmoid": True, "moe_router_enable_expert_bias": True}),
    (HUNYUAN, {"use_mla": False, "use_cla": False, "cla_share_factor": 2, "vit_type": "x", "im_end_id": 6}),
    (HUNYUAN, {"norm_type": "rms", "use_mixed_mlp_moe": True, "moe_drop_tokens": False, "org_vocab_size": 97}),
]
HARMFUL: list[tuple[str, dict[str, Any]]] = [
    (QWEN3, {"qkv_bias": True}),
    (QWEN3, {"shared_expert_intermediate_size": 16}),
    (QWEN3, {"use_qk_norm": False}),
    (QWEN3, {"hidden_act": "gelu"}),
    (QWEN3, {"cache_implementation": "static"}),
    (QWEN3, {"unknown": 0}),
    (NEXT, {"use_sliding_window": True}),
    ("llada2_moe_gqa4_e8_top2_groups", {"using_split_qkv_in_self_attention": True}),
    ("jamba_e8_top2", {"mamba_inner_layernorms": False}),
    ("exaone_moe_gqa2_e8_top2_groups", {"scoring_func": "softmax"}),
    ("exaone_moe_gqa2_e8_top2_groups", {"is_moe_layer": [False]}),
    (HY3, {"qk_norm": False}),
    (HY3, {"route_norm": False}),
    (HY3, {"moe_router_use_sigmoid": False}),
    (HY3, {"expert_hidden_dim": 7}),
    (HUNYUAN, {"use_mla": True}),
    (HUNYUAN, {"use_cla": True}),
    (HUNYUAN, {"norm_type": "layer"}),
    (HUNYUAN, {"moe_intermediate_size": [7, 7]}),
    (HUNYUAN, {"num_shared_expert": [1, 2]}),
    (HUNYUAN, {"use_mixed_mlp_moe": False}),
]


def raw_config(case: str) -> dict[str, Any]:
    return json.loads((GOLDENS / case / "config.json").read_text())


def read(raw: dict[str, Any], directory: Path) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(raw))
    return Checkpoint(directory).config


@pytest.mark.parametrize(("case", "fields"), NEUTRAL)
def test_values_that_change_nothing_are_accepted(case: str, fields: dict[str, Any], tmp_path: Path) -> None:
    assert read(raw_config(case) | fields, tmp_path) == Checkpoint(GOLDENS / case).config


@pytest.mark.parametrize(("case", "fields"), HARMFUL)
def test_values_that_may_change_something_are_refused_by_name(
    case: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="|".join(fields)):
        read(raw_config(case) | fields, tmp_path)


def test_other_names_of_fields_mean_the_same(tmp_path: Path) -> None:
    for case, old, new in (
        ("jamba_e8_top2", "max_position_embeddings", "n_ctx"),
        (HUNYUAN, "head_dim", "attention_head_dim"),
        ("exaone_moe_gqa2_e8_top2_groups", "first_k_dense_replace", "first_last_k_dense_replace"),
    ):
        raw = raw_config(case)
        if (value := raw.pop(old, None)) is not None:
            assert read(raw | {new: value}, tmp_path) == Checkpoint(GOLDENS / case).config
            with pytest.raises(ConfigError, match=new):
                read(raw | {new: value, old: 2 * value}, tmp_path)


def test_no_groups_may_be_written_as_0(tmp_path: Path) -> None:
    raw = raw_config("bailing_moe_gqa4_e8_top3")
    assert read(raw | {"n_group": 0, "topk_group": 0}, tmp_path) == read(
        raw | {"n_group": None, "topk_group": None}, tmp_path
    )


def test_lists_of_one_value_a_layer_are_read(tmp_path: Path) -> None:
    raw = raw_config(HUNYUAN)
    layers = raw["num_hidden_layers"]
    lists = {"moe_intermediate_size": [raw["intermediate_size"]] * layers, "num_shared_expert": [1] * layers}
    assert read(raw | lists, tmp_path) == Checkpoint(GOLDENS / HUNYUAN).config


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases_of_model_types_are_read_alike(alias: str, name: str, tmp_path: Path) -> None:
    assert alias not in FAMILIES
    case = next(path.parent for path in sorted(GOLDENS.glob(f"{name}_*/config.json")))
    raw = raw_config(case.name)
    assert raw["model_type"] == name
    assert read(raw | {"model_type": alias}, tmp_path) == Checkpoint(case).config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": -8}, "num_attention_heads must be positive and finite, got -8"),
        (
            {"num_hidden_layers": "4", "layer_types": ["full_attention"] * 2},
            "num_hidden_layers must be of type int, got '4'",
        ),
        ({"num_experts": 0, "num_experts_per_tok": 9}, "num_experts must be positive and finite, got 0"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method='hqq' is not supported"),
        ({"hidden_size": None, "head_dim": 0}, "hidden_size is missing; head_dim must be positive and finite, got 0"),
        ({"quantization_config": 7}, "quantization_config must be an object, got 7"),
    ],
)
def test_an_error_names_causes_and_not_their_consequences(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(raw_config(QWEN3) | fields, tmp_path)
    assert re.fullmatch(
        re.escape(f"config.json: {message}") + r"( \(only .*\))?(; fields not understood.*)?", str(caught.value)
    )
