"""From the tensors of a checkpoint to sharded parameters, a region at a time.

Host memory holds what the devices hold (where the host is the device) and one layer of one parameter, never a whole
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from tqdm import tqdm

from moe_jax.checkpoints.names import Region
from moe_jax.checkpoints.quantization import Tensors
from moe_jax.checkpoints.reading import Reader, Spans, reader_of
from moe_jax.config import Quantization
from moe_jax.errors import CheckpointError
from moe_jax.models import Parameters

FLOATS = ("F32", "BF16", "F16")
MOST_PROBLEMS_SHOWN = 20


def check(regions: Iterable[Region], files: Tensors, is_unused: Callable[[str], bool]) -> None:
    """Raise `CheckpointError`, naming them all, for tensors missing, left over, or of the wrong shape or dtype.

    Args:
      is_unused: of a tensor that is not read, whether it may be there.
    """
    found, problems, wanted = files.shapes(), [], set()
    for entry in (entry for region in regions for entry in region.entries):
        wanted.add(entry.name)
        shape, dtype = found.get(entry.name, (None, None))
        if shape is None:
            problems.append(f"{entry.name} is missing")
        elif shape != entry.shape:
            problems.append(f"{entry.name} has shape {list(shape)}, config.json implies {list(entry.shape)}")
        elif dtype not in FLOATS:
            problems.append(f"{entry.name} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
    problems += [f"{name} is not used by this model" for name in sorted(set(found) - wanted) if not is_unused(name)]
    problems = list(dict.fromkeys(problems))
    if problems:
        hidden = len(problems) - MOST_PROBLEMS_SHOWN
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise CheckpointError(
            "the weights do not match config.json:\n  " + "\n  ".join(problems[:MOST_PROBLEMS_SHOWN]) + more
        )


def load(
    abstract: Parameters, regions: Iterable[Region], files: Tensors, quantization: Quantization | None = None
) -> Parameters:
    """Fill parameters of the given shapes, dtypes and shardings from the files.

    Args:
      quantization: of the parameters that are held in eight bits.

    Raises:
      CheckpointError: a weight is NaN or infinite, in the file or in the parameter's dtype.
    """
    by_path = {path: list(group) for path, group in groupby(regions, lambda region: region.path)}
    hidden = jax.process_index() > 0 or None
    parameters = tqdm(nnx.to_flat_state(abstract), desc="loading", unit=" parameters", disable=hidden, leave=False)

    def filled(param: nnx.Variable, regions: Sequence[Region]) -> nnx.Variable:
        reader = reader_of(param, quantization, files)
        return param.replace(_load_parameter(param.get_value(), regions, reader, files))

    return nnx.from_flat_state((path, filled(param, by_path[path])) for path, param in parameters)


def check_finite(parameters: Parameters) -> None:
    """Raise `CheckpointError`, naming the parameters, if a weight is NaN or infinite."""
    _refuse(
        [".".join(map(str, path)) for path, leaf in nnx.to_flat_state(parameters) if not _all_finite(leaf.get_value())]
    )


def _refuse(names: Sequence[str]) -> None:
    if names:
        raise CheckpointError(
            f"weights are NaN or infinite in {', '.join(names)}: the checkpoint is damaged or diverged"
        )


@jax.jit
def _all_finite(value: Any) -> jax.Array:
    return jnp.isfinite(value[...]).all()


def _load_parameter(abstract: Any, regions: Sequence[Region], reader: Reader, files: Tensors) -> Any:
    if len(regions) == 1 and regions[0].shape == abstract.shape:
        whole = _load_region(regions[0], abstract, reader)
        _check_region(_all_finite(whole), regions[0], files)
        return whole
    whole = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)
    for region in regions:
        whole, finite = _put(whole, _load_region(region, abstract, reader), region.start)
        _check_region(finite, region, files)
    return whole


@partial(jax.jit, donate_argnums=0)
def _put(whole: Any, part: Any, start: tuple[int, ...]) -> tuple[Any, jax.Array]:
    """Scales have the regions of their numbers."""
    return jax.tree.map(partial(lax.dynamic_update_slice, start_indices=start), whole, part), _all_finite(part)


def _check_region(finite: jax.Array, region: Region, files: Tensors) -> None:
    """Waits for the answer, so that no more than one region is on its way."""
    if not finite:
        names = [entry.name for entry in region.entries]
        _refuse([name for name in names if not np.isfinite(files.read(name)).all()])
        raise CheckpointError(f"weights among {', '.join(names[:8])} are too large for the dtype: choose a wider one")


def _load_region(region: Region, parameter: Any, reader: Reader) -> Any:
    """The region as a value of its own, split as the parameter is."""
    leaves, structure = jax.tree.flatten(parameter)
    shapes = [_region_of(leaf.shape, region, parameter.shape) for leaf in leaves]
    last, hosts, shards = None, (), [[] for _ in leaves]
    for device, index in leaves[0].sharding.addressable_devices_indices_map(region.shape).items():
        if index != last:
            last, hosts = index, reader.read(region, _spans(index or (), region.shape))
        for of_leaf, host in zip(shards, hosts, strict=True):
            of_leaf.append(jax.device_put(host, device))
    arrays = [
        jax.make_array_from_single_device_arrays(shape, leaf.sharding, of_leaf)
        for shape, leaf, of_leaf in zip(shapes, leaves, shards, strict=True)
    ]
    return structure.unflatten(arrays)


def _region_of(leaf: tuple[int, ...], region: Region, parameter: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what belongs to a region: regions have all inputs, of which scales have few."""
    return tuple(part if own == size else own for own, part, size in zip(leaf, region.shape, parameter, strict=True))


def _spans(index: tuple[slice, ...], shape: tuple[int, ...]) -> Spans:
    return [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
