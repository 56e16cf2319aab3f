"""Reader of the `quantization_config` that compressed-tensors writes."""

from __future__ import annotations

from collections.abc import Sequence

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.formats.eight_bits import INT8, EightBits
from moe_jax.checkpoints.formats.four_bit_floats import MXFP4, NVFP4
from moe_jax.checkpoints.formats.packed_integers import PackedIntegers
from moe_jax.checkpoints.formats.scheme import Scheme
from moe_jax.checkpoints.tensor_files import EIGHT_BITS

SCALES = "{weight}_scale"


def read_compressed_tensors(fields: Fields) -> Sequence[Scheme]:
    """Read the groups of a config. Each group has one scheme for the weights of its targets."""
    fields.ignore("ignore", "kv_cache_scheme", "global_compression_ratio", "version", "quantization_status")
    fields.expect("sparsity_config", {})
    fields.expect("transform_config", {})
    common = fields.get("format", None)
    schemes: list[Scheme] = []
    groups = fields.inner("config_groups")
    for name in groups.names:
        group = groups.inner(name)
        group.ignore("targets", "input_activations", "output_activations")  # activations are exact
        scheme = _scheme(group.inner("weights"), group.get("format", None) or common, group)
        schemes += [scheme] if scheme and scheme not in schemes else []
    if not groups.names:
        fields.problem("config_groups must have a group of weights")
    return schemes


def _scheme(weights: Fields, format: object, group: Fields) -> Scheme | None:
    weights.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype")  # how scales were found, and their dtypes
    weights.expect("dynamic", False)
    kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
    strategy, size, actorder = (weights.get(name, None) for name in ("strategy", "group_size", "actorder"))
    symmetric = weights.take("symmetric", bool, True)
    block = weights.get("block_structure", None)
    per_group = size if strategy in ("group", "tensor_group") else None
    match (format, kind, bits):
        case ("float-quantized" | "naive-quantized" | "mxfp8-quantized" | None, "float", 8) if symmetric:
            return _scaled(weights, strategy, per_group, block, EIGHT_BITS)
        case ("int-quantized" | "naive-quantized", "int", 8) if symmetric:
            return _scaled(weights, strategy, per_group, block, INT8)
        case ("pack-quantized", "int", 4 | 8) if strategy in ("group", "channel") and _is_size(size, strategy):
            return PackedIntegers(bits, per_group, symmetric, ordered=actorder in ("group", "activation"))
        case ("nvfp4-pack-quantized", "float", 4) if size == 16 and symmetric:
            return NVFP4("{weight}_packed", "{weight}_global_scale", divides=True)
        case ("mxfp4-pack-quantized", "float", 4) if size == 32 and symmetric:
            return MXFP4()
        case _:
            group.problem(
                f"weights of {bits} bits, type {kind!r}, strategy {strategy!r}, group_size {size!r}, symmetric "
                f"{symmetric}, are not supported in format {format!r}"
            )
            return None


def _scaled(weights: Fields, strategy: object, size: object, block: object, dtype: str) -> Scheme | None:
    match (strategy, size, block):
        case ("tensor", _, _):
            return EightBits(SCALES, (None, None), dtype)
        case ("channel", _, _):
            return EightBits(SCALES, (1, None), dtype)
        case ("group", int(inputs), _) if inputs > 0:
            return EightBits(SCALES, (1, inputs), dtype)
        case ("block", _, [int(outputs), int(inputs)]) if outputs > 0 and inputs > 0:
            return EightBits(SCALES, (outputs, inputs), dtype)
        case _:
            weights.problem(f"strategy {strategy!r} with group_size {size!r} and block_structure {block!r} is unknown")
            return None


def _is_size(size: object, strategy: object) -> bool:
    return strategy == "channel" or (type(size) is int and size > 0)
