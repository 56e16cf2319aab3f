"""How the tensors of a Hugging Face checkpoint become the decoder's parameters.

A family gives one `Source` for each parameter of a block and of the model around it. Files hold a linear layer as
`[outputs, inputs]`, here it is `[inputs, outputs]` with heads as dimensions of their own; experts and layers are
separate tensors there and stacked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.models import ShardedDecoder

Path = tuple[Any, ...]
Index = tuple[int | slice, ...]


Layout = tuple[tuple[int, ...], ...]
"""For each dimension of a tensor in a file, the dimensions of the parameter that it is made of, the slowest first."""


@dataclass(frozen=True)
class Source:
    """The tensors one parameter is made of.

    `names` has one template, or two (gate and up) that are stacked on the second dimension from the right; `{layer}`
    and `{expert}` in it are numbers.
    """

    names: tuple[str, ...]
    layout: Callable[[int], Layout]
    """For a piece of so many dimensions, those of layers, of experts with a tensor each, and of gate and up not
    counted."""
    joined: tuple[str, ...] = ()
    """Where one tensor holds several parameters after each other, along its first dimension: all of them."""
    heads_of: str | None = None
    """Where it does so head by head: the parameter with as many heads."""


def plain(name: str) -> Source:
    """A tensor held as the file has it, but for a split of its only dimension into several."""
    return Source((name,), lambda dims: (tuple(range(dims)),))


def linear(*names: str, inputs: int = 1) -> Source:
    """`[outputs, inputs]` in the file, `[inputs, outputs]` here, the first `inputs` dimensions being inputs."""
    return Source(names, lambda dims: (tuple(range(inputs, dims)), tuple(range(inputs))))


def arranged(*names: str, here: str, file: str) -> Source:
    """Dimensions by letters, those that make one in parentheses: `here="e d p f", file="e (p f) d"`; `1` for none."""
    number = {letter: dim for dim, letter in enumerate(here.split())}
    groups = re.findall(r"\(([^)]*)\)|(\S+)", file)
    layout = tuple(tuple(number[letter] for letter in (many or one).split() if letter != "1") for many, one in groups)
    assert sorted(dim for group in layout for dim in group) == sorted(number.values()), "each letter once on both sides"

    def checked(dims: int) -> Layout:
        assert dims == len(number), f"{names} are pieces of {dims} dimensions, not {here}"
        return layout

    return Source(names, checked)


def convolution(name: str) -> Source:
    """A convolution over positions of each number by itself: `[numbers, 1, positions]` in the file."""
    return Source((name,), lambda dims: (tuple(range(dims - 1)), (), (dims - 1,)))


def joined(
    name: str, *parameters: str, source: Callable[[str], Source] = linear, heads_of: str | None = None
) -> dict[str, Source]:
    """Layers, linear ones by default, whose outputs follow each other in one tensor.

    Args:
      heads_of: a linear parameter of the block; for each of its heads the tensor holds a part of all the others.
    """
    return {parameter: replace(source(name), joined=parameters, heads_of=heads_of) for parameter in parameters}


@dataclass(frozen=True)
class TensorRows:
    """The same rows of each of several equal parts of a tensor."""

    parts: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.parts * (self.stop - self.start)

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """`[parts, rows, ...]`, a view."""
        return tensor.reshape(self.parts, -1, *tensor.shape[1:])[:, self.start : self.stop]


def within(prefix: str, sources: Mapping[str, Source]) -> dict[str, Source]:
    """The sources of a model that is a part of another."""
    named = {name: tuple(prefix + each for each in source.names) for name, source in sources.items()}
    return {name: replace(source, names=named[name]) for name, source in sources.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, or some of its rows, and their place in a region."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    rows: TensorRows | None
    """The part of the first dimension that is meant; `None` for all."""
    at: Index
    """Numbers, and slices with both ends."""
    piece_shape: tuple[int, ...]
    order: tuple[int, ...]
    """The piece's dimensions as the tensor has them, the slowest first."""

    def to_piece(self, tensor: np.ndarray) -> np.ndarray:
        part = tensor if self.rows is None else self.rows.of(tensor).reshape(self.part_shape)
        return part.reshape([self.piece_shape[dim] for dim in self.order]).transpose(np.argsort(self.order))

    def to_tensor(self, piece: np.ndarray) -> np.ndarray:
        """The part of the tensor that `rows` says."""
        return piece.reshape(self.piece_shape).transpose(self.order).reshape(self.part_shape)

    @property
    def part_shape(self) -> tuple[int, ...]:
        return self.shape if self.rows is None else (self.rows.count, *self.shape[1:])


@dataclass(frozen=True)
class Region:
    """The part of a parameter that is moved at once: one layer of it, gate and up apart, over all experts; or all."""

    path: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]
    entries: list[Entry]


def whole_region(parts: Sequence[Region], shape: tuple[int, ...]) -> Region:
    """All of a parameter of this shape, from the regions that it is made of."""
    entries = [
        replace(entry, at=tuple(_shifted(place, first) for place, first in zip(entry.at, part.start, strict=True)))
        for part in parts
        for entry in part.entries
    ]
    return Region(parts[0].path, (0,) * len(shape), shape, entries)


def _shifted(place: int | slice, by: int) -> int | slice:
    return place + by if isinstance(place, int) else slice(place.start + by, place.stop + by)


def regions(decoder: ShardedDecoder, sources: Mapping[str, Source]) -> Iterator[Region]:
    """Every tensor that the checkpoint of this model has, parameter by parameter, layer by layer."""
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
                held = (decoder.config.vocab_size, *rest)
                at = tuple(slice(0, size) for size in held)
                entry = Entry(name, held, None, at, held, tuple(range(len(held))))
                yield Region(path, (0,) * len(shape), shape, [entry])
            case _:
                yield from _regions(sources[".".join(map(str, path))], path, shape, None, 0, None)


def _joined_rows(
    source: Source, block: Path, path: Path, shapes: Mapping[Path, tuple[int, ...]]
) -> tuple[TensorRows, int] | None:
    """The rows of a joined tensor that are one parameter of a block, and how many rows it has in all."""
    if not source.joined:
        return None

    def shape(name: str) -> tuple[int, ...]:
        return shapes[(*block, *name.split("."))][1:]  # less that of layers

    parts = 1 if source.heads_of is None else shape(source.heads_of)[1]
    rows = [
        math.prod(shape(name)[dim] for dim in source.layout(len(shape(name)))[0]) // parts for name in source.joined
    ]
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
    """Those of one layer of a parameter, or of one that is not stacked over layers."""
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
    """The experts of a region, and where along which dimension each lies."""
    if dim is None:
        yield 0, {}
    else:
        yield from ((expert, {dim: expert}) for expert in range(shape[dim]))


def _entry(
    name: str, region: tuple[int, ...], place: Mapping[int, int], source: Source, rows: tuple[TensorRows, int] | None
) -> Entry:
    """The tensor that lies at `place`, along dimensions that it does not have itself."""
    at = tuple(place.get(dim, slice(0, size)) for dim, size in enumerate(region))
    piece = tuple(size for dim, size in enumerate(region) if dim not in place)
    layout = source.layout(len(piece))
    shape = tuple(math.prod(piece[dim] for dim in dims) for dims in layout)
    order = tuple(dim for dims in layout for dim in dims)
    part, whole = (None, shape) if rows is None else (rows[0], (rows[1], *shape[1:]))
    return Entry(name, whole, part, at, piece, order)
