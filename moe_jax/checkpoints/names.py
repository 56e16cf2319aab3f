"""How the tensors of a Hugging Face checkpoint become the decoder's parameters.

A family gives one `Source` for each parameter of a block and of the model around it. Files hold a linear layer as
`[outputs, inputs]`, here it is `[inputs, outputs]` with heads as dimensions of their own; experts and layers are
separate tensors there and stacked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.models import Parameters, group_layers

Path = tuple[Any, ...]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Source:
    """The tensors one parameter is made of.

    `names` has one template, or two (gate and up) that are stacked on the second dimension from the right; `{layer}`
    and `{expert}` in it are numbers.
    """

    names: tuple[str, ...]
    inputs: int | None = None
    """For a linear layer: how many of the parameter's dimensions, not counting experts, are inputs."""


def plain(name: str) -> Source:
    """A tensor held as the file has it, but for a split of its first dimension into several."""
    return Source((name,))


def linear(*names: str, inputs: int = 1) -> Source:
    return Source(names, inputs)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file and its place in a region."""

    name: str
    shape: tuple[int, ...]
    at: Index
    """Numbers, and slices with both ends."""
    piece_shape: tuple[int, ...]
    transposed: bool

    def to_piece(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.piece_shape)

    def to_tensor(self, piece: np.ndarray) -> np.ndarray:
        return piece.reshape(self.shape[::-1]).T if self.transposed else piece.reshape(self.shape)


@dataclass(frozen=True)
class Region:
    """The part of a parameter that is moved at once: one layer of it, gate and up apart, over all experts."""

    path: Path
    start: tuple[int, ...]
    shape: tuple[int, ...]
    entries: list[Entry]

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.shape, strict=True))


def regions(config: ModelConfig, parameters: Parameters, sources: Mapping[str, Source]) -> Iterator[Region]:
    """Every tensor that the checkpoint of this model has, parameter by parameter, layer by layer."""
    groups = group_layers(config.layers)
    for path, param in nnx.to_flat_state(parameters):
        match path:
            case ("stacks", int(group), "unit", int(block), *rest):
                source = sources[".".join(map(str, rest))]
                for repeat in range(groups[group].repeats):
                    yield from _regions(source, path, param.shape, repeat, groups[group].layer(repeat, block))
            case ("embedding" | "head", "table"):
                name, shape = sources[".".join(map(str, path))].names[0], (config.vocab_size, config.hidden)
                entry = Entry(name, shape, (slice(0, shape[0]), slice(0, shape[1])), shape, transposed=False)
                yield Region(path, (0, 0), param.shape, [entry])
            case _:
                yield from _regions(sources[".".join(map(str, path))], path, param.shape, None, layer=0)


def _regions(
    source: Source, path: Path, param_shape: tuple[int, ...], repeat: int | None, layer: int
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
            _entry(template.format(layer=layer, expert=expert), shape, dict.fromkeys(fixed, 0) | place, source.inputs)
            for expert, place in _experts(shape, expert_dim)
        ]
        yield Region(path, start, shape, entries)


def _experts(shape: tuple[int, ...], dim: int | None) -> Iterator[tuple[int, dict[int, int]]]:
    """The experts of a region, and where along which dimension each lies."""
    if dim is None:
        yield 0, {}
    else:
        yield from ((expert, {dim: expert}) for expert in range(shape[dim]))


def _entry(name: str, region: tuple[int, ...], place: Mapping[int, int], inputs: int | None) -> Entry:
    """The tensor that lies at `place`, along dimensions that it does not have itself."""
    at = tuple(place.get(dim, slice(0, size)) for dim, size in enumerate(region))
    piece = tuple(size for dim, size in enumerate(region) if dim not in place)
    shape = (math.prod(piece),) if inputs is None else (math.prod(piece[inputs:]), math.prod(piece[:inputs]))
    return Entry(name, shape, at, piece, transposed=inputs is not None)
