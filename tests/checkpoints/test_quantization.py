"""Block-quantized checkpoints load as their dequantized weights."""

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
"""The case, and a block size that does not divide its weights."""
PLAIN = json.loads((GOLDENS / CASE / "config.json").read_text())
QUANTIZED = "model.layers.1.mlp.up_proj.weight"


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize block by block; return the eight-bit weight, its scales and the dequantized weight."""
    rows, columns = (range(0, size, step) for size, step in zip(weight.shape, BLOCK, strict=True))
    eight_bit, dequantized = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn), np.zeros(weight.shape, np.float32)
    scales = np.zeros((len(rows), len(columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        at = slice(rows[i], rows[i] + BLOCK[0]), slice(columns[j], columns[j] + BLOCK[1])
        scales[i, j] = np.abs(weight[at]).max() / 448
        eight_bit[at] = (weight[at] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        dequantized[at] = eight_bit[at].astype(np.float32) * scales[i, j]
    return eight_bit, scales, dequantized


def write(path: Path, stored: dict[str, np.ndarray], **fields: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(PLAIN | fields))
    save_file(stored, path / "model.safetensors")
    return path


Tensors = dict[str, np.ndarray]


def checkpoints() -> tuple[Tensors, Tensors]:
    """Return a checkpoint with quantized projections, and the same checkpoint dequantized."""
    stored, dequantized = tensors(GOLDENS / CASE), tensors(GOLDENS / CASE)
    for name in [name for name in stored if name.endswith("proj.weight")]:
        stored[name], stored[f"{name}_scale_inv"], dequantized[name] = quantized(stored[name])
    return stored, dequantized


CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}


def test_quantized_weights_load_and_export_dequantized(tmp_path: Path) -> None:
    stored, dequantized = checkpoints()
    quantized_path = write(tmp_path / "quantized", stored, quantization_config=CONFIG)
    path = write(tmp_path / "dequantized", dequantized)
    assert_equal(load(quantized_path, "expert=2,tensor=2"), load(path, "expert=2,tensor=2"))
    checkpoint = Checkpoint(quantized_path)
    target = decoder(checkpoint, "expert=2")
    parameters = checkpoint.load(target)
    checkpoint.save_hugging_face(tmp_path / "out", target, parameters)
    checkpoint.save_orbax(tmp_path / "stored", parameters)
    for exported in ("out", "stored"):
        assert json.loads((tmp_path / exported / "config.json").read_text()) == PLAIN, "an export is not quantized"
    expected, got = tensors(path), tensors(tmp_path / "out")
    assert expected.keys() == got.keys()
    assert all((got[name] == value).all() for name, value in expected.items())
    assert_equal(load(tmp_path / "out"), load(path))


@pytest.mark.parametrize("scales", [None, np.ones((1, 3), np.float32)])
def test_missing_and_misshapen_scales_are_named(scales: np.ndarray | None, tmp_path: Path) -> None:
    stored, _ = checkpoints()
    del stored[f"{QUANTIZED}_scale_inv"]
    if scales is not None:
        stored[f"{QUANTIZED}_scale_inv"] = scales
    path = write(tmp_path / "quantized", stored, quantization_config=CONFIG)
    found = "is missing" if scales is None else r"has shape \[1, 3\], expected \[2, 3\]"
    with pytest.raises(CheckpointError, match=rf"{QUANTIZED}_scale_inv {found}"):
        load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [8]}, "weight_block_size must be two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8], "sparse": 1}, "understood.*quantization_config.sparse"),
    ],
)
def test_other_quantization_methods_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpoint(write(tmp_path / "other", tensors(GOLDENS / CASE), quantization_config=config))
