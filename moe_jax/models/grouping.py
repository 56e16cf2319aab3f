"""Group repeating layers, so that each kind is traced and compiled once, however deep the model is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.config import LayerConfig


@dataclass(frozen=True)
class Group:
    """Layers of `unit`, repeated `repeats` times, starting at layer index `first`."""

    first: int
    unit: tuple[LayerConfig, ...]
    repeats: int

    @property
    def layer_indices(self) -> list[range]:
        """Layer indices of each layer of the unit, one for each repeat."""
        length, end = len(self.unit), self.first + self.repeats * len(self.unit)
        return [range(self.first + index, end, length) for index in range(length)]

    def layer_index(self, repeat: int, index: int) -> int:
        """Return the layer index of layer `index` of the unit in one of the repeats."""
        return self.first + repeat * len(self.unit) + index


def ungrouped(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
    """Put all layers into one unit without repeats, which compiles to no loop."""
    return (Group(0, tuple(layers), 1),)


def group_layers(layers: Sequence[LayerConfig]) -> tuple[Group, ...]:
    """Group the layers in order. Each group takes the unit whose repeats save the most layers."""
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
    """Count how often the first `length` layers repeat from the start."""
    repeats = 1
    while layers[repeats * length : (repeats + 1) * length] == layers[:length]:
        repeats += 1
    return repeats
