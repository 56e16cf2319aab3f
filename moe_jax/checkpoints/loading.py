"""Load the tensors of a checkpoint into sharded parameters, one region at a time.

Memory bound: besides the parameters on the devices, loading needs memory for one region, which is one layer of one
parameter with all its experts (or a whole parameter of at most `SMALL` bytes). The host never holds the whole model,
except where it is itself the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from tqdm import tqdm

from moe_jax.checkpoints.formats import Tensors
from moe_jax.checkpoints.reading import Reader, Spans, reader_of
from moe_jax.checkpoints.regions import Path, Region, whole_region
from moe_jax.config import Quantization
from moe_jax.errors import CheckpointError
from moe_jax.kernels.quantized import QuantizedWeight
from moe_jax.models import Parameters, zeros

FLOATS = ("F32", "BF16", "F16")
MAX_PROBLEMS_SHOWN = 20
SMALL = 2**22
"""Largest parameter, in bytes, that is assembled on the host. A larger one needs a program compiled for its shape."""


def check(regions: Iterable[Region], files: Tensors, is_ignored: Callable[[str], bool]) -> None:
    """Check that the files hold the tensors of all regions, and no others.

    Args:
      is_ignored: return True for the name of a tensor that the files may hold though no region reads it.

    Raises:
      CheckpointError: tensors are missing, left over, or of the wrong shape or dtype; the message names them.
    """
    found, problems, expected = files.shapes(), [], set()
    for entry in (entry for region in regions for entry in region.entries):
        expected.add(entry.name)
        shape, dtype = found.get(entry.name, (None, None))
        if shape is None:
            problems.append(f"{entry.name} is missing")
        elif shape != entry.shape:
            problems.append(f"{entry.name} has shape {list(shape)}, config.json implies {list(entry.shape)}")
        elif dtype not in FLOATS:
            problems.append(f"{entry.name} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
    problems += [f"{name} is not used by this model" for name in sorted(set(found) - expected) if not is_ignored(name)]
    problems = list(dict.fromkeys(problems))
    if problems:
        hidden = len(problems) - MAX_PROBLEMS_SHOWN
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise CheckpointError(
            "the weights do not match config.json:\n  " + "\n  ".join(problems[:MAX_PROBLEMS_SHOWN]) + more
        )


def load(
    abstract: Parameters, regions: Iterable[Region], files: Tensors, quantization: Quantization | None = None
) -> Parameters:
    """Load parameters from the files.

    Args:
      abstract: shapes, dtypes and shardings of the parameters.
      regions: the regions of all parameters.
      quantization: quantization of the parameters that `abstract` has in eight bits.

    Raises:
      CheckpointError: a weight is NaN or infinite, in the file or in the parameter's dtype.
    """
    flat = [(path, param, param.get_value()) for path, param in nnx.to_flat_state(abstract)]
    grouped = {path: list(group) for path, group in groupby(regions, lambda region: region.path)}
    by_path = {path: _whole_if_small(grouped[path], shape) for path, _, shape in flat}
    in_parts = zeros({path: shape for path, _, shape in flat if not _is_whole(by_path[path], shape)})
    hidden = jax.process_index() > 0 or None
    loaded, whole = {}, {}
    for path, param, shape in tqdm(flat, desc="loading", unit=" parameters", disable=hidden, leave=False):
        reader = reader_of(param, quantization, files)
        if path in in_parts:
            loaded[path] = _filled(in_parts.pop(path), by_path[path], reader, files)
        else:
            region = _load_region(by_path[path][0], shape, reader)
            loaded[path] = whole[path] = jax.block_until_ready(region)
    for path, finite in _finite(whole).items():
        _check_region(finite, by_path[path][0], files)
    return nnx.from_flat_state((path, param.replace(loaded[path])) for path, param, _ in flat)


def check_finite(parameters: Parameters) -> None:
    """Raise `CheckpointError`, which names the parameters, if a weight is NaN or infinite."""
    found = _finite({path: leaf.get_value() for path, leaf in nnx.to_flat_state(parameters)})
    _refuse_nonfinite([".".join(map(str, path)) for path, finite in found.items() if not finite])


def _refuse_nonfinite(names: Sequence[str]) -> None:
    if names:
        raise CheckpointError(
            f"weights are NaN or infinite in {', '.join(names)}: the checkpoint is damaged or diverged"
        )


def _finite(values: Mapping[Path, Any]) -> dict[Path, Any]:
    """Return for each value whether all its numbers are finite.

    Small values are checked on the host, other values by one program on the devices. Values that are shared by several
    processes are checked on the devices too, for all processes must get the same answer.
    """
    on_host = {path: value for path, value in values.items() if _is_small(value) and value.is_fully_addressable}
    others = {path: value for path, value in values.items() if path not in on_host}
    found = {path: np.isfinite(value).all() for path, value in on_host.items()}
    return found | (_finite_on_devices(others) if others else {})


@jax.jit
def _finite_on_devices(values: dict[Path, Any]) -> dict[Path, jax.Array]:
    return {path: _all_finite(value) for path, value in values.items()}


def _all_finite(value: Any) -> jax.Array:
    return jnp.isfinite(value[...]).all()


def _is_small(value: Any) -> bool:
    """Return True if a parameter is assembled on the host.

    A quantized parameter never is: the file may have only some of its regions in eight bits.
    """
    return not isinstance(value, QuantizedWeight) and math.prod(value.shape) * value.dtype.itemsize <= SMALL


def _whole_if_small(regions: list[Region], abstract: Any) -> list[Region]:
    return [whole_region(regions, abstract.shape)] if _is_small(abstract) else regions


def _is_whole(regions: Sequence[Region], abstract: Any) -> bool:
    """Return True if one region is the whole parameter."""
    return len(regions) == 1 and regions[0].shape == abstract.shape


def _filled(whole: Any, regions: Sequence[Region], reader: Reader, files: Tensors) -> Any:
    """Load the regions of a parameter one after the other and write them into `whole`."""
    for region in regions:
        whole, finite = _put(whole, _load_region(region, whole, reader), region.start)
        _check_region(finite, region, files)
    return whole


@partial(jax.jit, donate_argnums=0)
def _put(whole: Any, part: Any, start: tuple[int, ...]) -> tuple[Any, jax.Array]:
    """Write a region into its parameter; return the parameter and whether the region is finite.

    The scales of a quantized parameter start at the same index as its numbers.
    """
    return jax.tree.map(partial(lax.dynamic_update_slice, start_indices=start), whole, part), _all_finite(part)


def _check_region(finite: jax.Array, region: Region, files: Tensors) -> None:
    """Raise `CheckpointError` if a region is not finite.

    Reading `finite` blocks until the region is written, so only one region is in memory at a time.
    """
    if not finite:
        largest = {entry.name: np.abs(files.read(entry.name)).max() for entry in region.entries}
        _refuse_nonfinite([name for name, value in largest.items() if not np.isfinite(value)])
        name = max(largest, key=lambda name: largest[name])
        raise CheckpointError(f"weights of {name} are too large for the dtype: choose a wider one")


def _load_region(region: Region, parameter: Any, reader: Reader) -> Any:
    """Read a region onto the devices, sharded like the parameter."""
    leaves, structure = jax.tree.flatten(parameter)
    shapes = [_leaf_shape(leaf.shape, region, parameter.shape) for leaf in leaves]
    last, hosts, shards = None, (), [[] for _ in leaves]
    for device, index in leaves[0].sharding.addressable_devices_indices_map(region.shape).items():
        if index != last:
            last, hosts = index, reader.read(region, _spans(index or (), region.shape))
        for leaf_shards, host in zip(shards, hosts, strict=True):
            leaf_shards.append(jax.device_put(host, device))
    arrays = [
        jax.make_array_from_single_device_arrays(shape, leaf.sharding, leaf_shards)
        for shape, leaf, leaf_shards in zip(shapes, leaves, shards, strict=True)
    ]
    return structure.unflatten(arrays)


def _leaf_shape(leaf: tuple[int, ...], region: Region, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a region's numbers or scales. A region has all inputs, for which there are fewer scales."""
    dims = zip(leaf, region.shape, parameter, strict=True)
    return tuple(part if leaf_size == size else leaf_size for leaf_size, part, size in dims)


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> Spans:
    return [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
