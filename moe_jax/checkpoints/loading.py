"""From the tensors of a checkpoint to sharded parameters, a region at a time.

Host memory holds what the devices hold (where the host is the device) and one layer of one parameter, never a whole
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from tqdm import tqdm

from moe_jax.checkpoints.names import Index, Path, Region
from moe_jax.checkpoints.quantization import Tensors
from moe_jax.errors import CheckpointError
from moe_jax.models import Parameters, zeros

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


def load(abstract: Parameters, regions: Iterable[Region], files: Tensors) -> Parameters:
    """Fill parameters of the given shapes, dtypes and shardings from the files.

    Raises:
      CheckpointError: a weight is NaN or infinite, in the file or in the parameter's dtype.
    """
    by_path = {path: list(group) for path, group in groupby(regions, lambda region: region.path)}
    flat = [(path, param, param.get_value()) for path, param in nnx.to_flat_state(abstract)]
    in_parts = zeros({path: shape for path, _, shape in flat if not _is_whole(by_path[path], shape)})
    hidden = jax.process_index() > 0 or None
    loaded, whole = {}, {}
    for path, _, shape in tqdm(flat, desc="loading", unit=" parameters", disable=hidden, leave=False):
        if path in in_parts:
            loaded[path] = _filled(in_parts.pop(path), by_path[path], files)
        else:
            loaded[path] = whole[path] = _load_region(by_path[path][0], shape, files).block_until_ready()
    for path, finite in _finite(whole).items():
        _check_region(finite, by_path[path][0], files)
    return nnx.from_flat_state((path, param.replace(loaded[path])) for path, param, _ in flat)


def check_finite(parameters: Parameters) -> None:
    """Raise `CheckpointError`, naming the parameters, if a weight is NaN or infinite."""
    found = _finite({path: leaf.get_value() for path, leaf in nnx.to_flat_state(parameters)})
    _refuse([".".join(map(str, path)) for path, finite in found.items() if not finite])


def _refuse(names: Sequence[str]) -> None:
    if names:
        raise CheckpointError(
            f"weights are NaN or infinite in {', '.join(names)}: the checkpoint is damaged or diverged"
        )


@jax.jit
def _finite(arrays: dict[Path, jax.Array]) -> dict[Path, jax.Array]:
    """Of each, whether all its numbers are: one program for all."""
    return jax.tree.map(lambda array: jnp.isfinite(array).all(), arrays)


def _is_whole(regions: Sequence[Region], abstract: jax.ShapeDtypeStruct) -> bool:
    """Whether there is one region, which is all of the parameter."""
    return len(regions) == 1 and regions[0].shape == abstract.shape


def _filled(whole: jax.Array, regions: Sequence[Region], files: Tensors) -> jax.Array:
    """A parameter with its regions written into it."""
    for region in regions:
        whole, finite = _put(whole, _load_region(region, whole, files), region.start)
        _check_region(finite, region, files)
    return whole


@partial(jax.jit, donate_argnums=0)
def _put(whole: jax.Array, part: jax.Array, start: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    return lax.dynamic_update_slice(whole, part, start), jnp.isfinite(part).all()


def _check_region(finite: jax.Array, region: Region, files: Tensors) -> None:
    """Waits for the answer, so that no more than one region is on its way."""
    if not finite:
        names = [entry.name for entry in region.entries]
        _refuse([name for name in names if not np.isfinite(files.read(name)).all()])
        raise CheckpointError(f"weights among {', '.join(names[:8])} are too large for the dtype: choose a wider one")


def _load_region(region: Region, parameter: jax.ShapeDtypeStruct | jax.Array, files: Tensors) -> jax.Array:
    """The region as an array of its own, split as the parameter is."""
    shards, last, host = [], None, np.empty(0)
    for device, index in parameter.sharding.addressable_devices_indices_map(region.shape).items():
        if index != last:
            last, host = index, _read_part(region, index or (), parameter.dtype, files)
        shards.append(jax.device_put(host, device))
    return jax.make_array_from_single_device_arrays(region.shape, parameter.sharding, shards)


def _read_part(region: Region, index: tuple[slice, ...], dtype: np.dtype, files: Tensors) -> np.ndarray:
    """The part `index` of a region; zero where no tensor reaches (padding of the vocabulary)."""
    spans = [range(*part.indices(size)) for part, size in zip(index, region.shape, strict=True)]
    out = np.zeros([len(span) for span in spans], dtype)
    for entry in region.entries:
        overlap = _overlap(entry.at, spans)
        if overlap is not None:
            source, target = overlap
            with np.errstate(over="ignore"):
                out[target] = entry.to_piece(files.read(entry.name))[source]
    return out


def _overlap(at: Index, spans: Sequence[range]) -> tuple[Index, Index] | None:
    """Where a piece that lies at `at` meets `spans`: the part of the piece, and its place in the spans."""
    source: list[slice] = []
    target: list[int | slice] = []
    for place, span in zip(at, spans, strict=True):
        first, stop = (place, place + 1) if isinstance(place, int) else (place.start, place.stop)
        low, high = max(first, span.start), min(stop, span.stop)
        if low >= high:
            return None
        if isinstance(place, int):
            target.append(low - span.start)
        else:
            source.append(slice(low - first, high - first))
            target.append(slice(low - span.start, high - span.start))
    return tuple(source), tuple(target)
