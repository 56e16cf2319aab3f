"""From the tensors of a checkpoint to sharded parameters, a layer of one parameter at a time.

Host memory holds what the devices hold (where the host is the device) and one layer of one parameter, never a whole
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from moe_jax.checkpoints.names import Entry, Index
from moe_jax.checkpoints.tensor_files import TensorFiles
from moe_jax.errors import CheckpointError
from moe_jax.models import Parameters

FLOATS = ("F32", "BF16", "F16")
MOST_PROBLEMS_SHOWN = 20


def check(entries: Iterable[Entry], files: TensorFiles, unused: frozenset[str] = frozenset()) -> None:
    """Raise `CheckpointError`, naming them all, for tensors missing, left over, or of the wrong shape or dtype.

    Args:
      unused: tensors that may be there and are not read.
    """
    found, problems, wanted = files.shapes(), [], set()
    for entry in entries:
        wanted.add(entry.name)
        shape, dtype = found.get(entry.name, (None, None))
        if shape is None:
            problems.append(f"{entry.name} is missing")
        elif shape != entry.shape:
            problems.append(f"{entry.name} has shape {list(shape)}, config.json implies {list(entry.shape)}")
        elif dtype not in FLOATS:
            problems.append(f"{entry.name} has dtype {dtype}, expected one of {', '.join(FLOATS)}")
    problems += [f"{name} is not used by this model" for name in sorted(set(found) - wanted - unused)]
    if problems:
        hidden = len(problems) - MOST_PROBLEMS_SHOWN
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise CheckpointError(
            "the weights do not match config.json:\n  " + "\n  ".join(problems[:MOST_PROBLEMS_SHOWN]) + more
        )


def load(abstract: Parameters, entries: Iterable[Entry], files: TensorFiles) -> Parameters:
    """Fill parameters of the given shapes, dtypes and shardings from the files.

    Raises:
      CheckpointError: a weight is NaN or infinite.
    """
    by_path = {path: list(group) for path, group in groupby(entries, lambda entry: entry.path)}
    flat = [
        (path, param.replace(_load_parameter(param.get_value(), by_path[path], files)))
        for path, param in tqdm(
            nnx.to_flat_state(abstract), desc="loading", unit=" parameters", disable=None, leave=False
        )
    ]
    parameters = nnx.from_flat_state(flat)
    check_finite(parameters)
    return parameters


def check_finite(parameters: Parameters) -> None:
    """Raise `CheckpointError`, naming the parameters, if a weight is NaN or infinite."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree))(parameters)
    bad = [".".join(map(str, path)) for path, ok in nnx.to_flat_state(finite) if not ok.get_value()]
    if bad:
        raise CheckpointError(f"weights are NaN or infinite in {', '.join(bad)}: the checkpoint is damaged or diverged")


def _load_parameter(abstract: jax.ShapeDtypeStruct, entries: Sequence[Entry], files: TensorFiles) -> jax.Array:
    if entries[0].repeat is None:
        return _load_layer(abstract.shape, abstract.dtype, abstract.sharding, entries, files)
    sharding = NamedSharding(abstract.sharding.mesh, PartitionSpec(*abstract.sharding.spec[1:]))
    stacked = jnp.zeros(abstract.shape, abstract.dtype, device=abstract.sharding)
    for repeat, of_layer in groupby(entries, lambda entry: entry.repeat):
        layer = _load_layer(abstract.shape[1:], abstract.dtype, sharding, list(of_layer), files)
        stacked = _set_layer(stacked, layer, repeat)
    return stacked


@partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, layer: jax.Array, repeat: int) -> jax.Array:
    return stacked.at[repeat].set(layer)


def _load_layer(
    shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding, entries: Sequence[Entry], files: TensorFiles
) -> jax.Array:
    shards, last, host = [], None, np.empty(0)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        if index != last:
            last, host = index, _read_part(shape, dtype, index or (), entries, files)
        shards.append(jax.device_put(host, device))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read_part(
    shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...], entries: Sequence[Entry], files: TensorFiles
) -> np.ndarray:
    """The part `index` of one layer of a parameter; zero where no tensor reaches (padding of the vocabulary)."""
    spans = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    out = np.zeros([len(span) for span in spans], dtype)
    for entry in entries:
        overlap = _overlap(entry.at, spans)
        if overlap is not None:
            source, target = overlap
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
