"""Readers of the two configs that NVIDIA's Model Optimizer writes: in config.json, and hf_quant_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.formats.eight_bits import EightBits
from moe_jax.checkpoints.formats.four_bit_floats import MXFP4_GROUP, NVFP4
from moe_jax.checkpoints.formats.scheme import Scheme

SCALES = "{weight}_scale"
_NVFP4 = NVFP4("{weight}", "{weight}_scale_2", divides=False)
ALGORITHMS: Mapping[str, Scheme] = {
    "FP8": EightBits(SCALES, (None, None)),
    "FP8_PER_CHANNEL_PER_TOKEN": EightBits(SCALES, (1, None)),
    "NVFP4": _NVFP4,
    "W4A16_NVFP4": _NVFP4,
    "MXFP8": EightBits(SCALES, (1, MXFP4_GROUP)),
}
MIXED = "MIXED_PRECISION"


def read_modelopt(fields: Fields) -> Sequence[Scheme]:
    """Read a config in either form: `quantized_layers` may name the algorithm of each layer."""
    fields.ignore("producer", "ignore", "exclude_modules", "targets")
    fields.ignore("kv_cache_scheme", "kv_cache_quant_algo")  # the cache is exact
    fields.ignore("config_groups")  # they repeat the algorithms
    fields.expect("group_size", 16, 32)
    algorithm, layers = fields.get("quant_algo", None), fields.get("quantized_layers", {})
    if not isinstance(layers, dict):
        fields.problem(f"quantized_layers must be an object, got {layers!r}")
        return []
    named = [algorithm] if algorithm != MIXED else [_algorithm_of(layer) for layer in layers.values()]
    if unknown := sorted({str(name) for name in named} - ALGORITHMS.keys()):
        fields.problem(f"quant_algo {', '.join(unknown)} is not supported (only {', '.join(ALGORITHMS)})")
        return []
    return list(dict.fromkeys(ALGORITHMS[str(name)] for name in named))


def config_in(hf_quant_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `quantization_config` that hf_quant_config.json stands for, where config.json has none."""
    inner = hf_quant_config.get("quantization")
    return {"quant_method": "modelopt", **(inner if isinstance(inner, dict) else {})}


def _algorithm_of(layer: Any) -> Any:
    return layer.get("quant_algo") if isinstance(layer, dict) else layer
