"""Each quantized format decodes to the numbers that the library that writes it decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from test_goldens import GOLDENS

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.formats import DequantizedTensors, read_schemes
from moe_jax.checkpoints.formats.modelopt import config_in
from moe_jax.checkpoints.tensor_files import TensorFiles
from moe_jax.errors import CheckpointError, ConfigError

FORMATS = GOLDENS / "formats"
WEIGHT = "m.weight"
OUTPUTS, INPUTS, GROUP = 16, 64, 32
E2M1 = ml_dtypes.float4_e2m1fn
rng = np.random.default_rng(0)


def save(directory: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Write tensors as one file; float8 is written as its bytes, whose dtype the header then names."""
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
    wide = {name: names[tensor.dtype.name] for name, tensor in tensors.items() if tensor.dtype.name in names}
    path = directory / "model.safetensors"
    save_file({name: tensor.view(np.uint8) if name in wide else tensor for name, tensor in tensors.items()}, path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name, dtype in wide.items():
        header[name]["dtype"] = dtype
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
    return directory


def decode(directory: Path, config: dict[str, Any], weight: str = WEIGHT) -> np.ndarray:
    schemes = Fields({"quantization_config": config}).read(read_schemes)
    with TensorFiles(directory) as files:
        tensors = DequantizedTensors(files, schemes)
        assert list(tensors.shapes()) == [weight], "scales are no weights of the model"
        decoded = tensors.read(weight)
        assert tensors.shapes()[weight] == (decoded.shape, "F32")
    assert decoded.dtype == np.float32
    return decoded


@pytest.mark.parametrize("golden", sorted(FORMATS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_a_weight_of_a_library(golden: Path, tmp_path: Path) -> None:
    with safe_open(golden, framework="numpy") as file:
        config = json.loads(file.metadata()["quantization_config"])
        expected = file.get_tensor("expected")
    (tmp_path / "model.safetensors").write_bytes(golden.read_bytes())
    schemes = Fields({"quantization_config": config}).read(read_schemes)
    with TensorFiles(tmp_path) as files:
        np.testing.assert_array_equal(DequantizedTensors(files, schemes).read(WEIGHT), expected)


def pack(codes: np.ndarray, bits: int, dim: int) -> np.ndarray:
    """Pack codes into words of 32 bits along a dimension, the lowest bits first."""
    grouped = np.moveaxis(codes, dim, -1).astype(np.uint32)
    grouped = grouped.reshape(*grouped.shape[:-1], -1, 32 // bits) << np.arange(0, 32, bits, dtype=np.uint32)
    return np.moveaxis(np.bitwise_or.reduce(grouped, axis=-1).view(np.int32), -1, dim)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("has_groups", [False, True])
def test_gptq(bits: int, version: str, has_groups: bool, tmp_path: Path) -> None:
    codes = rng.integers(0, 2**bits, (INPUTS, OUTPUTS))
    zeros = rng.integers(0, 2**bits, (INPUTS // GROUP, OUTPUTS))
    scales = rng.random((INPUTS // GROUP, OUTPUTS)).astype(np.float16)
    group_of = rng.permutation(INPUTS) // GROUP if has_groups else np.arange(INPUTS) // GROUP
    stored = (zeros - (version == "gptq")) % 2**bits
    tensors = {"m.qweight": pack(codes, bits, 0), "m.qzeros": pack(stored, bits, 1), "m.scales": scales}
    if has_groups:
        tensors["m.g_idx"] = group_of.astype(np.int32)
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    expected = ((codes - zeros[group_of]).astype(np.float32) * scales.astype(np.float32)[group_of]).T
    np.testing.assert_array_equal(decode(save(tmp_path, tensors), config), expected)


@pytest.mark.parametrize("is_alone", [False, True])
def test_nvfp4_of_modelopt(is_alone: bool, tmp_path: Path) -> None:
    numbers = rng.integers(0, 16, (OUTPUTS, INPUTS)).astype(np.uint8)
    scales = (rng.random((OUTPUTS, INPUTS // 16)) * 100).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(0.01)
    tensors = {
        WEIGHT: numbers[:, ::2] | numbers[:, 1::2] << 4,
        f"{WEIGHT}_scale": scales,
        f"{WEIGHT}_scale_2": np.array(whole),
        "m.input_scale": np.array(whole),
        "m.k_proj.k_scale": np.array(whole),
    }
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    config = config_in({"producer": {}, "quantization": quantization})
    if not is_alone:
        config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "config_groups": {}}
    expected = numbers.view(E2M1).astype(np.float32) * np.repeat(scales.astype(np.float32) * whole, 16, axis=1)
    np.testing.assert_array_equal(decode(save(tmp_path, tensors), config), expected)


def test_layers_of_modelopt_may_have_different_algorithms(tmp_path: Path) -> None:
    eight = rng.random((OUTPUTS, INPUTS)).astype(ml_dtypes.float8_e4m3fn)
    four = rng.integers(0, 256, (OUTPUTS, INPUTS // 2)).astype(np.uint8)
    one = np.float32(1)
    tensors = {
        "a.weight": eight,
        "a.weight_scale": np.array(2 * one),
        "b.weight": four,
        "b.weight_scale": np.ones((OUTPUTS, INPUTS // 16), ml_dtypes.float8_e4m3fn),
        "b.weight_scale_2": np.array(one),
        "c.weight": eight,
        "c.weight_scale": np.full((OUTPUTS, INPUTS // 32), 128, np.uint8),
        "d.weight": np.ones((2, 2), np.float32),
    }
    layers = {"a": {"quant_algo": "FP8"}, "b": {"quant_algo": "NVFP4"}, "c": {"quant_algo": "MXFP8"}}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    schemes = Fields({"quantization_config": config}).read(read_schemes)
    with TensorFiles(save(tmp_path, tensors)) as files:
        found = DequantizedTensors(files, schemes)
        assert sorted(found.shapes()) == ["a.weight", "b.weight", "c.weight", "d.weight"]
        np.testing.assert_array_equal(found.read("a.weight"), eight.astype(np.float32) * 2)
        np.testing.assert_array_equal(found.read("c.weight"), eight.astype(np.float32) * 2)
        assert found.read("b.weight").shape == (OUTPUTS, INPUTS)
        assert found.read("d.weight").dtype == np.float32


@pytest.mark.parametrize("dtype", ["u8", "e8m0"])
def test_experts_in_one_tensor(dtype: str, tmp_path: Path) -> None:
    numbers = rng.random((3, OUTPUTS, INPUTS)).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(120, 130, (3, OUTPUTS, INPUTS // 32)).astype(np.uint8)
    scales = exponents if dtype == "u8" else exponents.view(ml_dtypes.float8_e8m0fnu)
    config = {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    tensors = {"m.gate_up_proj": numbers, "m.gate_up_proj_scale_inv": scales}
    expected = numbers.astype(np.float32) * np.repeat(np.exp2(exponents.astype(np.float32) - 127), 32, axis=2)
    np.testing.assert_array_equal(decode(save(tmp_path, tensors), config, "m.gate_up_proj"), expected)
    schemes = Fields({"quantization_config": config}).read(read_schemes)
    with TensorFiles(tmp_path) as files:
        part = DequantizedTensors(files, schemes).read("m.gate_up_proj", slice(1, 3))
    np.testing.assert_array_equal(part, expected[1:])


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 32]}
GPTQ_TENSORS = {
    "m.qweight": np.zeros((INPUTS // 8, OUTPUTS), np.int32),
    "m.qzeros": np.zeros((INPUTS // GROUP, OUTPUTS // 8), np.int32),
    "m.scales": np.ones((INPUTS // GROUP, OUTPUTS), np.float16),
}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 24}}},
}
INT4_TENSORS = {f"{WEIGHT}_packed": np.zeros((OUTPUTS, INPUTS // 8), np.int32)}


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (GPTQ, GPTQ_TENSORS | {"m.scales": np.ones((3, OUTPUTS), np.float16)}, r"m.scales has shape \[3, 16\], exp"),
        (GPTQ, GPTQ_TENSORS | {"m.qzeros": np.zeros((2, 2), np.float32)}, "m.qzeros has dtype F32, expected one of I"),
        (GPTQ, {"m.qweight": GPTQ_TENSORS["m.qweight"]}, "m.qzeros is missing"),
        (GPTQ, GPTQ_TENSORS | {"m.g_idx": np.full(INPUTS, 2, np.int32)}, "m.g_idx names groups 2 to 2 of 2"),
        (GPTQ, GPTQ_TENSORS | {"m.g_idx": np.full(INPUTS, -1, np.int32)}, "m.g_idx names groups -1 to -1 of 2"),
        (INT4, INT4_TENSORS, "m.weight: groups of 24 do not divide 64 inputs"),
        (
            FP8,
            {WEIGHT: np.zeros((16, 64), ml_dtypes.float8_e4m3fn), f"{WEIGHT}_scale_inv": np.ones((1, 2), np.int32)},
            "m.weight_scale_inv has dtype I32, expected one of F32",
        ),
        (FP8, {WEIGHT: np.zeros(16, ml_dtypes.float8_e4m3fn)}, "m.weight: only matrices are quantized"),
    ],
)
def test_hostile_tensors_are_named(
    config: dict[str, Any], tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        decode(save(tmp_path, tensors), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "higgs"}, "quant_method='higgs' is not supported"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 is not supported"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo W4A8_AWQ is not supported"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": 3}, "quantized_layers must"),
        ({"quant_method": "compressed-tensors"}, "config_groups must have a group"),
        ({**INT4, "format": "marlin-24"}, "weights of 4 bits, type 'int', .* are not supported in format 'marlin-24'"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv' is not supported"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4' is not supported"),
        ({"quant_method": ["fp8"]}, r"quant_method=\['fp8'\] is not supported"),
        ({**FP8, "kv": 1}, "quantization_config.kv"),
    ],
)
def test_other_formats_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fields({"quantization_config": config}).read(read_schemes)


def test_a_scale_that_is_nan_makes_nan(tmp_path: Path) -> None:
    """Loading refuses weights that are NaN."""
    numbers = np.ones((OUTPUTS, INPUTS), ml_dtypes.float8_e4m3fn)
    exponents = np.full((OUTPUTS, INPUTS // 32), 255, np.uint8)
    config = {"quant_method": "fp8", "weight_block_size": [1, 32]}
    assert np.isnan(decode(save(tmp_path, {WEIGHT: numbers, f"{WEIGHT}_scale_inv": exponents}), config)).all()
