"""Make the goldens of quantized formats: one small weight for each format, and its numbers as a library decodes them.

    pip install torch transformers compressed-tensors bitsandbytes
    python tests/goldens/make_formats.py [directory of an unpacked autoawq package]

Each file has the tensors of a weight `m.weight` as a checkpoint has them, `expected` in float32, and the
`quantization_config` in its metadata. Formats whose libraries need a GPU are written by the tests themselves.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(__file__).parent / "formats"
OUTPUTS, INPUTS, GROUP = 24, 64, 32


def write(name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"quantization_config": json.dumps(config)}
    save_file(stored | {"expected": expected.float().contiguous()}, HERE / f"{name}.safetensors", metadata)


def compressed(name: str, format: str, args: dict[str, Any], parts: dict[str, torch.Tensor]) -> None:
    """Compress with compressed-tensors and decompress again, with scales in float32."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args), format=format)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(parts, scheme)
    exact = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in stored.items()}
    if format == "nvfp4-pack-quantized":  # the compressor would compute in bfloat16
        unpacked = unpack_fp4_from_uint8(exact["weight_packed"], OUTPUTS, INPUTS, dtype=torch.float32)
        scales, whole = exact["weight_scale"].float(), exact["weight_global_scale"]
        expected = dequantize(unpacked, scales, args=scheme.weights, dtype=torch.float32, global_scale=whole)
    else:
        expected = compressor.decompress(exact, scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**args, "dynamic": False}}},
    }
    write(name, config, {f"m.{key}": value for key, value in stored.items()}, expected)


def integers(weight: torch.Tensor) -> None:
    grouped = weight.reshape(OUTPUTS, -1, GROUP)
    scale = (grouped.abs().amax(-1) / 7).bfloat16()
    zero = torch.zeros_like(scale, dtype=torch.int8)
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
    symmetric = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressed("int4_symmetric", "pack-quantized", {**args, "symmetric": True}, symmetric)
    spread = grouped.amax(-1) - grouped.amin(-1)
    scale = (spread / 15).bfloat16()
    zero = (-8 - grouped.amin(-1) / scale.float()).round().clamp(-8, 7).to(torch.int8)
    asymmetric = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressed("int4_asymmetric", "pack-quantized", {**args, "symmetric": False}, asymmetric)


def floats(weight: torch.Tensor) -> None:
    whole = (448 * 6 / weight.abs().max()).reshape(1)
    scale = (weight.reshape(OUTPUTS, -1, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn).float()
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    parts = {"weight": weight, "weight_scale": scale, "weight_global_scale": whole}
    compressed("nvfp4_compressed", "nvfp4-pack-quantized", args, parts)
    args = {"num_bits": 8, "type": "float", "symmetric": True}
    channel = {"weight": weight, "weight_scale": weight.abs().amax(-1, keepdim=True) / 448}
    compressed("fp8_channel", "float-quantized", {**args, "strategy": "channel"}, channel)
    tensor = {"weight": weight, "weight_scale": weight.abs().max().reshape(1) / 448}
    compressed("fp8_tensor", "float-quantized", {**args, "strategy": "tensor"}, tensor)


def gpt_oss() -> None:
    blocks = torch.randint(0, 256, (2, OUTPUTS, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, OUTPUTS, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    stored = {"m.weight_blocks": blocks, "m.weight_scales": scales}
    write("mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, stored, expected)


def eight_bit_blocks(weight: torch.Tensor) -> None:
    decode = Fp8Dequantize(None)._dequantize_one
    config = {"quant_method": "fp8", "weight_block_size": [12, 32]}
    scales = torch.rand(2, 2) + 0.5
    numbers = (weight / scales.repeat_interleave(12, 0).repeat_interleave(32, 1)).to(torch.float8_e4m3fn)
    stored = {"m.weight": numbers, "m.weight_scale_inv": scales}
    write("fp8_block", config, stored, decode(numbers, scales, torch.float32))
    exponents = torch.randint(120, 130, (OUTPUTS, INPUTS // 32), dtype=torch.uint8)
    stored = {"m.weight": numbers, "m.weight_scale_inv": exponents}
    config = {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    write("mxfp8", config, stored, decode(numbers, exponents, torch.float32))


def normal_floats(weight: torch.Tensor) -> None:
    for nested in (False, True):
        codes, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        stored = {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        config["bnb_4bit_use_double_quant"] = nested
        expected = bitsandbytes.functional.dequantize_4bit(codes, state)
        write("nf4_nested" if nested else "nf4", config, stored, expected)


def awq(package: Path) -> None:
    spec = importlib.util.spec_from_file_location("packing_utils", package / "awq/utils/packing_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    codes = torch.randint(-(2**31), 2**31, (INPUTS, OUTPUTS // 8), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (INPUTS // GROUP, OUTPUTS // 8), dtype=torch.int32)
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).half()
    expected = module.dequantize_gemm(codes, zeros, scales.float(), 4, GROUP).T
    stored = {"m.qweight": codes, "m.qzeros": zeros, "m.scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    write("awq", config, stored, expected)


def main() -> None:
    HERE.mkdir(exist_ok=True)
    torch.manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS)
    integers(weight)
    floats(weight)
    gpt_oss()
    eight_bit_blocks(weight)
    normal_floats(weight)
    if len(sys.argv) > 1:
        awq(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
