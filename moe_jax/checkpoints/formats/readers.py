"""Readers of `quantization_config`, one for each `quant_method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.checkpoints.formats.compressed_tensors import read_compressed_tensors
from moe_jax.checkpoints.formats.eight_bits import EightBits
from moe_jax.checkpoints.formats.four_bit_floats import GroupedMXFP4
from moe_jax.checkpoints.formats.modelopt import read_modelopt
from moe_jax.checkpoints.formats.nf4 import NF4
from moe_jax.checkpoints.formats.packed_integers import AWQ, GPTQ
from moe_jax.checkpoints.formats.scheme import Scheme

FIELD, METHOD = "quantization_config", "quant_method"


def read_schemes(fields: Fields) -> Sequence[Scheme]:
    """Read `quantization_config`, which a multimodal config may have in its text config; `[]` if there is none."""
    if fields.has(TEXT) and not fields.has(FIELD):
        fields = fields.inner(TEXT)
    inner = fields.inner(FIELD)
    if not fields.has(FIELD):
        return []
    inner.ignore("modules_to_not_convert", "ignored_layers", "modules_to_convert")  # dtypes show what is quantized
    method = inner.get(METHOD, None)
    if not isinstance(method, str) or method not in READERS:
        inner.ignore_all()
        inner.problem(f"{METHOD}={method!r} is not supported (only {', '.join(map(repr, READERS))})")
        return []
    return READERS[method](inner)


def _fp8(fields: Fields) -> Sequence[Scheme]:
    fields.ignore("activation_scheme", "dequantize")  # activations are exact, and weights are decoded as requested
    fields.expect("fmt", "e4m3", "float8_e4m3fn")
    fields.expect("scale_fmt", "float", "ue8m0")  # the dtype of each scale shows whether it is an exponent
    fields.expect("expert_dtype", "fp8")
    if not fields.has("weight_block_size"):
        fields.ignore("weight_block_size")
        return [EightBits("{weight}_scale", (None, None))]
    block = fields.take_list("weight_block_size", int)
    if len(block) != 2 or min(block) < 1:
        fields.problem(f"weight_block_size must be two sizes, such as [128, 128], got {block}")
        return []
    return [EightBits("{weight}_scale_inv", (block[0], block[1]))]


def _mxfp4(fields: Fields) -> Sequence[Scheme]:
    fields.ignore("dequantize")
    return [GroupedMXFP4()]


def _awq(fields: Fields) -> Sequence[Scheme]:
    fields.ignore("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")  # ways to run
    for name in ("version", "format"):
        fields.expect(name, "gemm", "GEMM")
    fields.expect_all({"bits": 4, "zero_point": True})
    return [AWQ(_group(fields))]


def _gptq(fields: Fields) -> Sequence[Scheme]:
    fields.ignore(  # how the weights were found, and how to run them
        *("sym", "desc_act", "act_group_aware", "true_sequential", "damp_percent", "meta", "dataset", "tokenizer"),
        *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id"),
        *("max_input_length", "cache_block_outputs", "modules_in_block_to_quantize", "backend", "static_groups"),
        *("model_name_or_path", "model_file_base_name", "quantizer", "use_cuda_fp16", "use_exllama", "exllama_config"),
    )
    fields.expect_all({"lm_head": False, "pack_dtype": "int32", "dynamic": {}})
    for name in ("checkpoint_format", "format"):
        fields.expect(name, "gptq", "gptq_v2")
    bits = fields.take("bits", int, 4)
    if bits not in (4, 8):
        fields.problem(f"bits={bits} is not supported (only 4, 8)")
    versions = [fields.get(name, "gptq") for name in ("checkpoint_format", "format")]
    return [GPTQ(bits, _group(fields), zero_offset=0 if "gptq_v2" in versions else 1)]


def _bitsandbytes(fields: Fields) -> Sequence[Scheme]:
    fields.ignore(  # ways to run, and settings of the eight-bit method
        *("_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload"),
        *("llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold"),
    )
    fields.expect_all({"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_storage": "uint8"})
    fields.expect("bnb_4bit_quant_type", "nf4")
    return [NF4(nested=fields.take("bnb_4bit_use_double_quant", bool, False))]


READERS: Mapping[str, Callable[[Fields], Sequence[Scheme]]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "modelopt": read_modelopt,
    "compressed-tensors": read_compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
}


def _group(fields: Fields) -> int | None:
    """Read `group_size`: inputs that share a scale; -1 for all inputs."""
    if fields.get("group_size", 128) == -1:
        return None
    return fields.take("group_size", int, 128)
