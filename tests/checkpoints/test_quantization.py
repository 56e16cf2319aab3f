"""Weights in eight bits are loaded as the numbers that they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_checkpoint import assert_equal, decoder, load, tensors
from test_goldens import GOLDENS

from moe_jax.checkpoints import Checkpoint
from moe_jax.errors import CheckpointError, ConfigError

CASE, BLOCK = "qwen3_moe_gqa2_e12_top1_dense", (24, 12)
"""Blocks that do not divide the weights."""
PLAIN = json.loads((GOLDENS / CASE / "config.json").read_text())
SOME = "model.layers.1.mlp.up_proj.weight"


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The weight in eight bits, its scales, and the numbers that they mean, block after block."""
    rows, columns = (range(0, size, of) for size, of in zip(weight.shape, BLOCK, strict=True))
    eight, meant = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn), np.zeros(weight.shape, np.float32)
    scales = np.zeros((len(rows), len(columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        at = slice(rows[i], rows[i] + BLOCK[0]), slice(columns[j], columns[j] + BLOCK[1])
        scales[i, j] = np.abs(weight[at]).max() / 448
        eight[at] = (weight[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        meant[at] = eight[at].astype(np.float32) * scales[i, j]
    return eight, scales, meant


def write(path: Path, held: dict[str, np.ndarray], **fields: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(PLAIN | fields))
    save_file(held, path / "model.safetensors")
    return path


Tensors = dict[str, np.ndarray]


def both() -> tuple[Tensors, Tensors]:
    """A checkpoint with its projections in eight bits, and one with the numbers that they mean."""
    held, meant = tensors(GOLDENS / CASE), tensors(GOLDENS / CASE)
    for name in [name for name in held if name.endswith("proj.weight")]:
        held[name], held[f"{name}_scale_inv"], meant[name] = quantized(held[name])
    return held, meant


CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}


def test_they_are_what_they_mean(tmp_path: Path) -> None:
    held, numbers = both()
    eight, meant = write(tmp_path / "eight", held, quantization_config=CONFIG), write(tmp_path / "meant", numbers)
    assert_equal(load(eight, "expert=2,tensor=2"), load(meant, "expert=2,tensor=2"))
    checkpoint = Checkpoint(eight)
    there = decoder(checkpoint, "expert=2")
    parameters = checkpoint.load(there)
    checkpoint.save_hugging_face(tmp_path / "out", there, parameters)
    checkpoint.save_orbax(tmp_path / "stored", parameters)
    for exported in ("out", "stored"):
        assert json.loads((tmp_path / exported / "config.json").read_text()) == PLAIN, (
            "its weights are in no eight bits"
        )
    expected, got = tensors(meant), tensors(tmp_path / "out")
    assert expected.keys() == got.keys()
    assert all((got[name] == value).all() for name, value in expected.items())
    assert_equal(load(tmp_path / "out"), load(meant))


@pytest.mark.parametrize("scales", [None, np.ones((1, 3), np.float32)])
def test_scales_that_are_missing_or_of_other_blocks_are_named(scales: np.ndarray | None, tmp_path: Path) -> None:
    held, _ = both()
    del held[f"{SOME}_scale_inv"]
    if scales is not None:
        held[f"{SOME}_scale_inv"] = scales
    path = write(tmp_path / "eight", held, quantization_config=CONFIG)
    found = r"None" if scales is None else r"\(1, 3\)"
    with pytest.raises(CheckpointError, match=rf"{SOME}_scale_inv: expected \(2, 3\), got {found}"):
        load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "mxfp4"}, "quantization_config.quant_method='mxfp4' is not supported"),
        ({"quant_method": "fp8"}, "weight_block_size must be two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8], "sparse": 1}, "understood.*quantization_config.sparse"),
    ],
)
def test_other_ways_to_quantise_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpoint(write(tmp_path / "other", tensors(GOLDENS / CASE), quantization_config=config))
