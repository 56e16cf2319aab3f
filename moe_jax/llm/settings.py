"""Settings of an `LLM` as text: for comparison between processes, and between runs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from reprlib import repr as shortened

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.analysis.roofline import held_bytes
from moe_jax.analysis.units import format_bytes
from moe_jax.config import ModelConfig
from moe_jax.engine import Options, Pages
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import Hardware


def shared_settings(
    decoder: ShardedDecoder, options: Options, pages: Pages, hardware: Hardware, *route: object
) -> dict[str, str]:
    """Describe the settings that must be the same in all processes."""
    return {
        "the model": f"{shortened(decoder.config)} ({_digest(decoder.config)})",
        "the hardware": str(hardware),
        "the mesh": str(decoder.placement),
        "the dtype": _format_dtype(decoder),
        "scan_layers": str(decoder.scan_layers),
        "the route": ", ".join(map(str, route)),
        "the options": str(options),
        "the cache": str(pages),
    }


def model_identity(path: Path, decoder: ShardedDecoder, gather_dtype: str, max_length: int) -> str:
    """Describe the settings that generated tokens depend on, besides the sampling parameters."""
    model = f"{path.resolve()}, {_digest(decoder.config)}"
    return f"{model}, {_format_dtype(decoder)}, {gather_dtype}, {max_length}"


def description(path: Path, decoder: ShardedDecoder, cache_bytes: int) -> str:
    """Describe model, dtype, placement and memory in one line.

    Args:
      cache_bytes: bytes of the cache on each device.
    """
    weights, cache = format_bytes(held_bytes(decoder.parameters)), format_bytes(cache_bytes)
    memory = f"{weights} of weights and {cache} of cache on each device"
    return f"{path.name} in {_format_dtype(decoder)} on {decoder.placement}: {memory}"


def dtype_name(dtype: DTypeLike) -> str:
    """Return the name of a dtype. Return a text for anything else, for the decoder to refuse."""
    try:
        return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _format_dtype(decoder: ShardedDecoder) -> str:
    return decoder.dtype if decoder.quantization is None else f"{decoder.dtype}, {decoder.quantization}"


def _digest(config: ModelConfig) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]
