"""Multimodal configs: the fields of `text_config` take precedence over the outer fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hub_configs
import pytest
import recurrent_hub_configs
from test_fields import read

from moe_jax.checkpoints import Checkpoint
from moe_jax.errors import ConfigError

WHOLE: dict[str, dict[str, Any]] = {
    "llama4": hub_configs.HUB["llama4"],
    "qwen3_5_moe": recurrent_hub_configs.HUB["qwen3_5_moe"],
    "step3p7": {"model_type": "step3p7", "text_config": hub_configs.HUB["step3p5"]},
}
SMALL = WHOLE["qwen3_5_moe"]


def with_text(raw: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return raw | {"text_config": raw["text_config"] | fields}


def checkpoint(path: Path, raw: dict[str, Any]) -> Checkpoint:
    (path / "config.json").write_text(json.dumps(raw))
    return Checkpoint(path)


@pytest.mark.parametrize("family", WHOLE)
def test_outer_fields_of_the_language_model_are_refused(family: str, tmp_path: Path) -> None:
    """Using or ignoring such a field could give another model than the file describes."""
    plain = read(WHOLE[family])
    for name, value in (("hidden_size", 64), ("rms_norm_eps", 0.5), ("num_experts_per_tok", 3), ("rope_theta", 7.0)):
        with pytest.raises(ConfigError, match=rf"fields not understood, which may change the computation: {name} \("):
            read(WHOLE[family] | {name: value})
    assert read(with_text(WHOLE[family], hidden_size=2 * plain.hidden)).hidden == 2 * plain.hidden
    eight_bits = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}
    for raw in (WHOLE[family] | eight_bits, with_text(WHOLE[family], **eight_bits)):
        assert checkpoint(tmp_path, raw).quantization("float8_e4m3fn")
    with pytest.raises(ConfigError, match=r"fields not understood.*: text_config\.quantization_config "):
        checkpoint(tmp_path, with_text(WHOLE[family] | eight_bits, **eight_bits))


@pytest.mark.parametrize(
    ("outside", "inside", "tied"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True), (None, True, True)],
)
def test_tie_word_embeddings_of_the_text_config_takes_precedence(
    outside: bool | None, inside: bool | None, tied: bool
) -> None:
    raw = with_text(SMALL | {"tie_word_embeddings": outside}, tie_word_embeddings=inside)
    assert read(raw).tied_embeddings is tied


@pytest.mark.parametrize(
    ("outside", "inside", "ends"),
    [(9, 3, {3}), (9, [3, 4], {3, 4}), (9, None, {9}), (None, 3, {3}), (None, None, set())],
)
def test_eos_token_id_of_the_text_config_takes_precedence(
    outside: Any, inside: Any, ends: set[int], tmp_path: Path
) -> None:
    raw = with_text(SMALL | {"eos_token_id": outside}, eos_token_id=inside)
    assert checkpoint(tmp_path, raw).eos_token_ids == ends


@pytest.mark.parametrize(
    ("outside", "inside", "dtype"),
    [
        ({"dtype": "float16"}, {"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, {"dtype": "float32"}, "float32"),
        ({"dtype": "float16"}, {"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, {"torch_dtype": "float32"}, "float32"),
        ({"torch_dtype": "float16"}, {"dtype": None}, "float16"),
        ({}, {}, "bfloat16"),
    ],
)
def test_dtype_of_the_text_config_takes_precedence(
    outside: dict[str, Any], inside: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    nothing = {"dtype": None, "torch_dtype": None}
    raw = with_text(SMALL | nothing | outside, **nothing | inside)
    assert checkpoint(tmp_path, raw).dtype == dtype
