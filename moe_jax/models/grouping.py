"""Runs of layers that repeat, so that one of each is traced and compiled, however deep the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.config import LayerConfig


@dataclass(frozen=True)
class Group:
    """`repeats` times the layers of `unit`, from layer number `first` on."""

    first: int
    unit: tuple[LayerConfig, ...]
    repeats: int

    @property
    def numbers(self) -> list[range]:
        """Of each layer of the unit, its numbers in all repeats."""
        each, last = len(self.unit), self.first + self.repeats * len(self.unit)
        return [range(self.first + index, last, each) for index in range(each)]

    def layer(self, repeat: int, index: int) -> int:
        """The number of layer `index` of the unit in a given repeat."""
        return self.first + repeat * len(self.unit) + index


def each_apart(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
    """No loop over layers: all of them are one unit."""
    return (Group(0, tuple(layers), 1),)


def group_layers(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
    """Cut the layers, in order, into groups; at each cut the unit is taken that saves the most layers."""
    groups: list[Group] = []
    first = 0
    while first < len(layers):
        rest = layers[first:]
        lengths = range(1, len(rest) // 2 + 1)
        unit = max(lengths, key=lambda n: n * (_repeats(rest, n) - 1), default=1)
        groups.append(Group(first, tuple(rest[:unit]), _repeats(rest, unit)))
        first += unit * groups[-1].repeats
    return tuple(groups)


def _repeats(layers: Sequence[LayerConfig], length: int) -> int:
    """How often the first `length` layers follow each other."""
    repeats = 1
    while layers[repeats * length : (repeats + 1) * length] == layers[:length]:
        repeats += 1
    return repeats
