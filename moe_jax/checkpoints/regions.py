"""The units of loading and export: regions of parameters, and the tensors that fill them.

A family's table of `Source`s (`weight_mapping`) says how one parameter is stored. `regions` applies the table to all
parameters of a decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.checkpoints.tensor_files import ALL
from moe_jax.checkpoints.weight_mapping import Source
from moe_jax.models import ShardedDecoder

Path = tuple[Any, ...]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorRows:
    """The rows of a shared tensor that belong to one parameter.

    The tensor has `parts` equal parts (its heads, or one). In each part the parameter has the rows from `start` to
    `stop`.
    """

    parts: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Rows of all parts together."""
        return self.parts * (self.stop - self.start)

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """Return a view of the rows, `[parts, rows, ...]`."""
        return tensor.reshape(self.parts, -1, *tensor.shape[1:])[:, self.start : self.stop]


@dataclass(frozen=True)
class Entry:
    """One tensor in the file, or some of its rows, and its place in a region."""

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    rows: TensorRows | None
    """Rows of the tensor that belong to the region; `None` for all rows."""
    at: Index
    """Place of the piece in the region: for each dimension a number, or a slice with both ends."""
    piece_shape: tuple[int, ...]
    """Shape of the piece: the dimensions of the region for which `at` has a slice."""
    order: tuple[int, ...]
    """Dimensions of the piece in the order of the tensor, the slowest first."""

    def read(self, part: Sequence[slice], read: Callable[[str, slice], np.ndarray]) -> np.ndarray:
        """Read a part of the piece, one slice for each dimension. Of several experts in a tensor, read those needed.

        Args:
          read: returns a tensor of this name, or a part of its first dimension.
        """
        dim = self.order[0]
        if self.rows is not None or len(self.shape) < 3 or self.shape[0] != self.piece_shape[dim]:
            return self.to_piece(read(self.name, ALL))[tuple(part)]
        count = len(range(self.shape[0])[part[dim]])
        shape = tuple(count if number == dim else size for number, size in enumerate(self.piece_shape))
        read_part = replace(self, shape=(count, *self.shape[1:]), piece_shape=shape)
        others = tuple(ALL if number == dim else each for number, each in enumerate(part))
        return read_part.to_piece(read(self.name, part[dim]))[others]

    def to_piece(self, tensor: np.ndarray) -> np.ndarray:
        """Convert the whole tensor to the piece in memory."""
        part = tensor if self.rows is None else self.rows.of(tensor).reshape(self.part_shape)
        return part.reshape([self.piece_shape[dim] for dim in self.order]).transpose(np.argsort(self.order))

    def to_tensor(self, piece: np.ndarray) -> np.ndarray:
        """Convert a piece to the tensor, or to its `rows`, in the layout of the file."""
        return piece.reshape(self.piece_shape).transpose(self.order).reshape(self.part_shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of the tensor, or of its `rows`."""
        return self.shape if self.rows is None else (self.rows.count, *self.shape[1:])


@dataclass(frozen=True)
class Region:
    """The unit of loading and export: one layer of one parameter with all its experts.

    Gate and up are separate regions. A parameter outside the layers is one region.
    """

    path: Path
    """Path of the parameter in the decoder's state."""
    start: tuple[int, ...]
    """First index of the region in the parameter."""
    shape: tuple[int, ...]
    """Shape of the region; its number of dimensions is that of the parameter."""
    entries: list[Entry]
    """Tensors that fill the region."""


def whole_region(parts: Sequence[Region], shape: tuple[int, ...]) -> Region:
    """Merge all regions of a parameter of this shape into one."""
    entries = [
        replace(entry, at=tuple(_shifted(place, first) for place, first in zip(entry.at, part.start, strict=True)))
        for part in parts
        for entry in part.entries
    ]
    return Region(parts[0].path, (0,) * len(shape), shape, entries)


def _shifted(place: int | slice, by: int) -> int | slice:
    return place + by if isinstance(place, int) else slice(place.start + by, place.stop + by)


def regions(decoder: ShardedDecoder, sources: Mapping[str, Source]) -> Iterator[Region]:
    """Yield the regions of all parameters, parameter by parameter, layer by layer."""
    groups = decoder.groups
    shapes = {path: param.shape for path, param in nnx.to_flat_state(decoder.parameters)}
    for path, shape in shapes.items():
        match path:
            case ("stacks", int(group), "unit", int(block), *rest):
                source = sources[".".join(map(str, rest))]
                rows = _joined_rows(source, path[: -len(rest)], path, shapes)
                for repeat in range(groups[group].repeats):
                    layer = groups[group].layer_index(repeat, block)
                    yield from _regions(source, path, shape, repeat, layer, rows)
            case ("embedding" | "head", _):
                (name,), (_, *rest) = sources[".".join(map(str, path))].names, shape
                unpadded = (decoder.config.vocab_size, *rest)
                at = tuple(slice(0, size) for size in unpadded)
                entry = Entry(name, unpadded, None, at, unpadded, tuple(range(len(unpadded))))
                yield Region(path, (0,) * len(shape), shape, [entry])
            case _:
                yield from _regions(sources[".".join(map(str, path))], path, shape, None, 0, None)


def _joined_rows(
    source: Source, block: Path, path: Path, shapes: Mapping[Path, tuple[int, ...]]
) -> tuple[TensorRows, int] | None:
    """Return the rows of a shared tensor that belong to one parameter, and the number of rows of the tensor."""
    if not source.joined:
        return None

    def layer_shape(name: str) -> tuple[int, ...]:
        return shapes[(*block, *name.split("."))][1:]

    parts = 1 if source.heads_of is None else layer_shape(source.heads_of)[1]
    rows = []
    for name in source.joined:
        shape = layer_shape(name)
        rows.append(math.prod(shape[dim] for dim in source.layout(len(shape))[0]) // parts)
    number = source.joined.index(".".join(map(str, path[len(block) :])))
    first = sum(rows[:number])
    return TensorRows(parts, first, first + rows[number]), parts * sum(rows)


def _regions(
    source: Source,
    path: Path,
    param_shape: tuple[int, ...],
    repeat: int | None,
    layer: int,
    rows: tuple[TensorRows, int] | None,
) -> Iterator[Region]:
    """Yield the regions of one layer of a parameter, or of a parameter that is not stacked over layers."""
    for part, template in enumerate(source.names):
        fixed = {} if repeat is None else {0: repeat}
        if len(source.names) > 1:
            fixed[len(param_shape) - 2] = part
        start = tuple(fixed.get(dim, 0) for dim in range(len(param_shape)))
        shape = tuple(1 if dim in fixed else size for dim, size in enumerate(param_shape))
        expert_dim = int(repeat is not None) if "{expert}" in template else None
        entries = [
            _entry(template.format(layer=layer, expert=expert), shape, dict.fromkeys(fixed, 0) | place, source, rows)
            for expert, place in _experts(shape, expert_dim)
        ]
        yield Region(path, start, shape, entries)


def _experts(shape: tuple[int, ...], dim: int | None) -> Iterator[tuple[int, dict[int, int]]]:
    """Yield the number of each expert that has its own tensor, and its index along the region's dimension `dim`."""
    if dim is None:
        yield 0, {}
    else:
        yield from ((expert, {dim: expert}) for expert in range(shape[dim]))


def _entry(
    name: str, region: tuple[int, ...], place: Mapping[int, int], source: Source, rows: tuple[TensorRows, int] | None
) -> Entry:
    """Return the entry of a tensor; `place` has its index along each dimension of the region that it lacks."""
    at = tuple(place.get(dim, slice(0, size)) for dim, size in enumerate(region))
    piece = tuple(size for dim, size in enumerate(region) if dim not in place)
    layout = source.layout(len(piece))
    shape = tuple(math.prod(piece[dim] for dim in dims) for dims in layout)
    order = tuple(dim for dims in layout for dim in dims)
    part, whole = (None, shape) if rows is None else (rows[0], (rows[1], *shape[1:]))
    return Entry(name, whole, part, at, piece, order)
