"""Mapping between the tensors of a Hugging Face checkpoint and the decoder's parameters.

A family has a table of `Source`s, one for each parameter. Each line of the table names tensors in the file and gives
the order of their dimensions. The same table loads, checks and exports:

- A linear layer is `[outputs, inputs]` in the file. In memory it is `[inputs, outputs]`, with one dimension for heads.
- Layers and experts are separate tensors in the file. In memory they are stacked, `[layers, experts, ...]`.
- The gate and up projections are separate tensors in most files. In memory they are stacked, `[..., 2, outputs]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

Layout = tuple[tuple[int, ...], ...]
"""For each dimension of a tensor in the file, the piece's dimensions that it merges, the slowest first.

A piece is the part of a parameter that comes from one tensor.
"""


@dataclass(frozen=True)
class Source:
    """One line of a family's table: the tensors that hold one parameter, and their layout."""

    names: tuple[str, ...]
    """Templates of tensor names, with `{layer}` and `{expert}` for numbers.

    Two names (gate and up) are stacked along the second dimension of the parameter from the right.
    """
    layout: Callable[[int], Layout]
    """Layout of a tensor, given the number of dimensions of its piece.

    The piece lacks the dimensions that separate tensors make up: layers, experts, and gate and up.
    """
    joined: tuple[str, ...] = ()
    """All parameters that share the tensor, one after the other along its first dimension; `()` if it has one."""
    heads_of: str | None = None
    """The parameter whose heads divide a shared tensor: each head has rows of all the parameters in `joined`."""


def plain(name: str) -> Source:
    """Source of a parameter that has the dimensions of the tensor. A vector may be split into several dimensions."""
    return Source((name,), lambda dims: (tuple(range(dims)),))


def linear(*names: str, inputs: int = 1) -> Source:
    """Source of a linear layer: `[outputs, inputs]` in the file, `[inputs, outputs]` in memory.

    Args:
      names: one name, or those of gate and up.
      inputs: the number of leading dimensions of the parameter that are inputs, such as 2 for heads and head_dim.
    """
    return Source(names, lambda dims: (tuple(range(inputs, dims)), tuple(range(inputs))))


def arranged(*names: str, parameter: str, tensor: str) -> Source:
    """Source of a parameter whose dimensions the file has in another order, or merged.

    Args:
      parameter: one letter for each dimension of the parameter without layers, such as `"e d p f"`.
      tensor: the same letters in the order of the tensor, such as `"e (p f) d"`. Parentheses merge dimensions; `1` is
        a dimension of size 1.
    """
    number = {letter: dim for dim, letter in enumerate(parameter.split())}
    groups = re.findall(r"\(([^)]*)\)|(\S+)", tensor)
    layout = tuple(tuple(number[letter] for letter in (many or one).split() if letter != "1") for many, one in groups)
    assert sorted(dim for group in layout for dim in group) == sorted(number.values()), "each letter once on both sides"

    def checked(dims: int) -> Layout:
        assert dims == len(number), f"{names} are pieces of {dims} dimensions, not {parameter}"
        return layout

    return Source(names, checked)


def convolution(name: str) -> Source:
    """Source of a depthwise convolution: `[channels, 1, positions]` in the file, `[channels, positions]` in memory."""
    return Source((name,), lambda dims: (tuple(range(dims - 1)), (), (dims - 1,)))


def joined(
    name: str, *parameters: str, source: Callable[[str], Source] = linear, heads_of: str | None = None
) -> dict[str, Source]:
    """Sources of parameters that one tensor holds one after the other, such as a fused query, key and value.

    Args:
      parameters: the parameters, in the order of the tensor's rows.
      source: layout of each parameter: `linear`, `plain` or `convolution`.
      heads_of: a linear parameter among them, if the tensor holds the rows of all parameters head by head.
    """
    return {parameter: replace(source(name), joined=parameters, heads_of=heads_of) for parameter in parameters}


def within(prefix: str, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Sources of a model that is a part of a larger one, whose tensor names begin with `prefix`."""
    return {
        parameter: replace(source, names=tuple(prefix + name for name in source.names))
        for parameter, source in sources.items()
    }
