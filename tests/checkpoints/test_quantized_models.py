"""A model in each quantized format loads as the model of its dequantized weights, on several placements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_checkpoint import assert_equal, decoder, load
from test_formats import save
from test_goldens import GOLDENS

from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.formats import DequantizedTensors, Scheme, read_schemes
from moe_jax.checkpoints.regions import regions
from moe_jax.checkpoints.tensor_files import TensorFiles

QWEN, GPT_OSS = "qwen3_moe_gqa4_e8_top2", "gpt_oss_gqa2_e8_top2_yarn"
SIZES = ("intermediate_size", "moe_intermediate_size")
"""Fields that are raised to a whole group."""
MESHES = ("data=2,expert=2", "expert=2,tensor=2")
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {**WEIGHTS, "symmetric": False}}},
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16},
    "mxfp8": {"quant_method": "fp8", "weight_block_size": [1, 32]},
    "fp8_tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
}
DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
rng = np.random.default_rng(0)


def codes_shape(method: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    match method, shape:
        case "mxfp4", (experts, inputs, outputs):
            return experts, outputs, inputs // 32, 16
        case "nvfp4", (outputs, inputs):
            return outputs, inputs // 2
        case "int4", (outputs, inputs):
            return outputs, inputs // 8
        case "awq", (outputs, inputs):
            return inputs, outputs // 8
        case "gptq", (outputs, inputs):
            return inputs // 8, outputs
    return shape


def random_tensors(method: str, scheme: Scheme, weight: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random codes and scales of a weight."""

    def name(template: str) -> str:
        return template.format(weight=weight, module=weight.removesuffix(".weight"))

    codes = codes_shape(method, shape)
    match scheme.dtype:
        case "F8_E4M3":
            numbers = rng.standard_normal(codes).astype(ml_dtypes.float8_e4m3fn)
        case "U8":
            numbers = rng.integers(0, 256, codes).astype(np.uint8)
        case _:
            numbers = rng.integers(-(2**31), 2**31, codes).astype(np.int32)
    tensors: dict[str, np.ndarray] = {name(scheme.codes): numbers}
    for template, companion in scheme.companions(shape).items():
        dtype = companion.dtypes[0] if method != "mxfp8" else "U8"
        if template.endswith("_shape"):
            tensors[name(template)] = np.array(shape, np.int32)
        elif dtype == "U8":
            tensors[name(template)] = rng.integers(118, 124, companion.shape).astype(np.uint8)
        elif dtype == "I32" and not companion.is_optional:
            tensors[name(template)] = rng.integers(-(2**31), 2**31, companion.shape).astype(np.int32)
        elif dtype in DTYPES:
            tensors[name(template)] = np.asarray(rng.random(companion.shape) / 20 + 0.02).astype(DTYPES[dtype])
    return tensors


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A quantized checkpoint, and the same checkpoint dequantized."""
    method, config = request.param, CONFIGS[request.param]
    exact, packed = tmp_path_factory.mktemp("exact"), tmp_path_factory.mktemp("packed")
    case = GOLDENS / (GPT_OSS if method == "mxfp4" else QWEN)
    plain = json.loads((case / "config.json").read_text())
    plain |= {name: 32 for name in SIZES if name in plain}
    for path, fields in ((exact, plain), (packed, plain | {"quantization_config": config})):
        (path / "config.json").write_text(json.dumps(fields))
    (scheme,) = Fields({"quantization_config": config}).read(read_schemes)
    checkpoint = Checkpoint(exact)
    stored: dict[str, np.ndarray] = {}
    for region in regions(decoder(checkpoint, "expert=1"), checkpoint.family.sources):
        for entry in region.entries:
            is_packed = entry.name.endswith(("_proj.weight", "gate_up_proj", "down_proj"))
            if is_packed and (method != "mxfp4" or len(entry.shape) == 3):
                stored |= random_tensors(method, scheme, entry.name, entry.shape)
            else:
                stored[entry.name] = rng.standard_normal(entry.shape).astype(np.float32) / 5
    save(packed, stored)
    with TensorFiles(packed) as files:
        tensors = DequantizedTensors(files, [scheme])
        save(exact, {name: np.ascontiguousarray(tensors.read(name)) for name in tensors.shapes()})
    return packed, exact


@pytest.mark.parametrize("mesh", MESHES)
def test_a_quantized_model_loads_as_its_dequantized_weights(models: tuple[Path, Path], mesh: str) -> None:
    packed, exact = models
    assert_equal(load(packed, mesh), load(exact, mesh))
