"""From sharded parameters back to a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import lax
from safetensors.numpy import save_file

from moe_jax.checkpoints.tensor_files import INDEX, SINGLE
from moe_jax.checkpoints.weight_mapping import Region
from moe_jax.models import Parameters

LARGEST_FILE = 4 * 2**30
"""Bytes after which a new safetensors file is begun."""


def export(
    directory: Path,
    regions: Iterable[Region],
    parameters: Parameters,
    dtype: np.dtype,
    largest_file: int = LARGEST_FILE,
) -> None:
    """Write the parameters as safetensors of one dtype, one file's worth in host memory at a time."""
    files, file_of = list(_write_files(directory, _tensors(regions, parameters, dtype), largest_file)), {}
    if len(files) == 1:
        (directory / files[0][0]).rename(directory / SINGLE)
        return
    for number, (written, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (directory / written).rename(directory / final)
        file_of |= dict.fromkeys(names, final)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}, indent=2))


def _tensors(regions: Iterable[Region], parameters: Parameters, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, as soon as all parameters that it joins have come."""
    flat = dict(nnx.to_flat_state(parameters))
    begun: dict[str, tuple[np.ndarray, int]] = {}
    for region in regions:
        host = np.asarray(_part(flat[region.path].get_value(), region.start, region.shape)).astype(dtype)
        for entry in region.entries:
            part = entry.to_tensor(host[entry.at])
            if entry.rows is None:
                yield entry.name, np.ascontiguousarray(part)
                continue
            whole, left = begun.pop(entry.name, (np.empty(entry.shape, dtype), entry.shape[0]))
            entry.rows.of(whole)[...] = part.reshape(entry.rows.of(whole).shape)
            left -= len(part)
            if left:
                begun[entry.name] = whole, left
            else:
                yield entry.name, whole
    assert not begun, f"only some rows of {begun.keys()}"


@partial(jax.jit, static_argnames="shape")
def _part(whole: jax.Array, start: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """One program for all parts of a shape, wherever they are."""
    return lax.dynamic_slice(whole, start, shape)


def _write_files(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], largest_file: int
) -> Iterator[tuple[str, list[str]]]:
    """Writes numbered files; yields each one's name and the names of its tensors."""
    number, held, size = 0, {}, 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > largest_file:
            yield _write(directory, number, held)
            number, held, size = number + 1, {}, 0
        held[name], size = tensor, size + tensor.nbytes
    yield _write(directory, number, held)


def _write(directory: Path, number: int, tensors: dict[str, np.ndarray]) -> tuple[str, list[str]]:
    name = f"part-{number:05d}.safetensors"
    save_file(tensors, directory / name, metadata={"format": "pt"})
    return name, list(tensors)
