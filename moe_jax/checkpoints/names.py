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
    """One tensor of the file and the place it has in a parameter."""

    name: str
    shape: tuple[int, ...]
    path: Path
    repeat: int | None
    """Its layer in a parameter that is stacked over layers."""
    at: Index
    """Its place in that layer, or in the whole parameter; slices have both ends."""
    piece_shape: tuple[int, ...]
    transposed: bool

    def to_piece(self, tensor: np.ndarray) -> np.ndarray:
        return (tensor.T if self.transposed else tensor).reshape(self.piece_shape)

    def to_tensor(self, piece: np.ndarray) -> np.ndarray:
        return piece.reshape(self.shape[::-1]).T if self.transposed else piece.reshape(self.shape)


def entries(config: ModelConfig, parameters: Parameters, sources: Mapping[str, Source]) -> Iterator[Entry]:
    """Every tensor that the checkpoint of this model has, parameter by parameter, layer by layer."""
    groups = group_layers(config.layers)
    for path, param in nnx.to_flat_state(parameters):
        match path:
            case ("stacks", int(group), "unit", int(block), *rest):
                source = sources[".".join(map(str, rest))]
                for repeat in range(groups[group].repeats):
                    layer = groups[group].layer(repeat, block)
                    yield from _layer_entries(source, path, repeat, param.shape[1:], layer)
            case ("embedding" | "head", "table"):
                name, shape = sources[".".join(map(str, path))].names[0], (config.vocab_size, config.hidden)
                yield Entry(name, shape, path, None, _whole(shape), shape, transposed=False)
            case _:
                yield from _layer_entries(sources[".".join(map(str, path))], path, None, param.shape, layer=0)


def _layer_entries(
    source: Source, path: Path, repeat: int | None, shape: tuple[int, ...], layer: int
) -> Iterator[Entry]:
    per_expert = "{expert}" in source.names[0]
    for expert in range(shape[0] if per_expert else 1):
        for part, template in enumerate(source.names):
            piece = shape[1:] if per_expert else shape
            at = _whole(piece)
            if len(source.names) > 1:
                piece, at = piece[:-2] + piece[-1:], (*at[:-2], part, at[-1])
            at = (expert, *at) if per_expert else at
            name = template.format(layer=layer, expert=expert)
            yield Entry(
                name, _file_shape(piece, source.inputs), path, repeat, at, piece, transposed=source.inputs is not None
            )


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple(slice(0, size) for size in shape)


def _file_shape(piece: tuple[int, ...], inputs: int | None) -> tuple[int, ...]:
    if inputs is None:
        return (math.prod(piece),)
    return (math.prod(piece[inputs:]), math.prod(piece[:inputs]))
