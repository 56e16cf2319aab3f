"""Export of sharded parameters as Hugging Face safetensors files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import lax
from safetensors.numpy import save_file

from moe_jax.checkpoints.regions import Region
from moe_jax.checkpoints.tensor_files import INDEX, SINGLE
from moe_jax.models import Parameters

LARGEST_FILE = 4 * 2**30
"""Largest size of a safetensors file, in bytes."""


def export(
    directory: Path,
    regions: Iterable[Region],
    parameters: Parameters,
    dtype_of: Callable[[str], np.dtype],
    largest_file: int = LARGEST_FILE,
) -> None:
    """Write the parameters as safetensors files.

    Host memory holds the tensors of one file, the region that is being copied, and tensors shared by several parameters
    (such as a fused query, key and value) until they are complete.

    Args:
      dtype_of: returns the dtype of a tensor by name.
      largest_file: size of a file in bytes above which the next tensor begins another one.
    """
    files, file_of = list(_write_files(directory, _tensors(regions, parameters, dtype_of), largest_file)), {}
    if len(files) == 1:
        (directory / files[0][0]).rename(directory / SINGLE)
        return
    for number, (written, names) in enumerate(files, start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (directory / written).rename(directory / final)
        file_of |= dict.fromkeys(names, final)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}, indent=2))


def _tensors(
    regions: Iterable[Region], parameters: Parameters, dtype_of: Callable[[str], np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and value of each tensor. A tensor of several parameters comes when all of them are copied."""
    flat = dict(nnx.to_flat_state(parameters))
    incomplete: dict[str, tuple[np.ndarray, int]] = {}
    for region in regions:
        host = np.asarray(_slice(flat[region.path].get_value(), region.start, region.shape))
        for entry in region.entries:
            dtype = dtype_of(entry.name)
            part = entry.to_tensor(host[entry.at].astype(dtype))
            if entry.rows is None:
                yield entry.name, np.ascontiguousarray(part)
                continue
            whole, left = incomplete.pop(entry.name, (np.empty(entry.shape, dtype), entry.shape[0]))
            entry.rows.of(whole)[...] = part.reshape(entry.rows.of(whole).shape)
            left -= len(part)
            if left:
                incomplete[entry.name] = whole, left
            else:
                yield entry.name, whole
    assert not incomplete, f"only some rows of {incomplete.keys()}"


@partial(jax.jit, static_argnames="shape")
def _slice(whole: jax.Array, start: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """Slice with one compiled program for all starts."""
    return lax.dynamic_slice(whole, start, shape)


def _write_files(
    directory: Path, tensors: Iterable[tuple[str, np.ndarray]], largest_file: int
) -> Iterator[tuple[str, list[str]]]:
    """Write numbered files; yield the name of each file and the names of its tensors."""
    number, pending, size = 0, {}, 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > largest_file:
            yield _write(directory, number, pending)
            number, pending, size = number + 1, {}, 0
        pending[name], size = tensor, size + tensor.nbytes
    yield _write(directory, number, pending)


def _write(directory: Path, number: int, tensors: dict[str, np.ndarray]) -> tuple[str, list[str]]:
    name = f"part-{number:05d}.safetensors"
    save_file(tensors, directory / name, metadata={"format": "pt"})
    return name, list(tensors)
