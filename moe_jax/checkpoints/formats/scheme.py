"""A scheme: how one quantized weight is stored in several tensors.

The weight has its name in the family's table, such as `...up_proj.weight`, and the shape `[outputs, inputs]`, or
`[experts, ...]` before it. Its numbers are in a tensor of codes; scales and zero points are in companions of the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moe_jax.checkpoints.tensor_files import ALL
from moe_jax.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = Mapping[str, tuple[Shape, str]]

WEIGHT = ".weight"


class Tensors(Protocol):
    """A collection of named tensors."""

    def shapes(self) -> Shapes:
        """Return the shape and the dtype of each tensor; the dtype has its safetensors name, such as `BF16`."""
        ...

    def read(self, name: str, part: slice = ALL) -> np.ndarray:
        """Return one tensor, or a part of its first dimension."""
        ...


@dataclass(frozen=True)
class Stored:
    """The tensors of one quantized weight. A template names a tensor with `{weight}`, or `{module}` without
    `.weight`."""

    weight: str
    """Name of the weight."""
    files: Tensors
    found: Shapes
    """Shape and dtype of each tensor of the files."""
    experts: int = 1
    """Size of the first dimension of all tensors, if they hold several experts."""
    part: slice = field(default_factory=lambda: ALL)
    """Experts to read."""

    def name(self, template: str) -> str:
        return template.format(weight=self.weight, module=self.weight.removesuffix(WEIGHT))

    def has(self, template: str) -> bool:
        return self.name(template) in self.found

    def shape(self, template: str) -> Shape:
        shape = self.found[self.name(template)][0]
        return (len(range(self.experts)[self.part]), *shape[1:]) if self._has_experts(shape) else shape

    def read(self, template: str) -> np.ndarray:
        name = self.name(template)
        return self.files.read(name, self.part if self._has_experts(self.found[name][0]) else ALL)

    def _has_experts(self, shape: Shape) -> bool:
        return self.experts > 1 and shape[:1] == (self.experts,)

    def refuse(self, template: str, reason: str) -> CheckpointError:
        """Return the error for a tensor whose content is wrong."""
        return CheckpointError(f"{self.name(template)} {reason}: the file is damaged, or config.json is another's")


@dataclass(frozen=True)
class Companion:
    """Required shape and dtype of a companion of the codes."""

    shape: Shape
    dtypes: tuple[str, ...]
    """Safetensors names of the dtypes."""
    is_optional: bool = False


class Scheme(Protocol):
    """Storage of quantized weights."""

    @property
    def codes(self) -> str:
        """Template of the name of the codes."""
        ...

    @property
    def dtype(self) -> str:
        """Safetensors name of the dtype of the codes."""
        ...

    def weight_shape(self, stored: Stored) -> Shape:
        """Return the shape of the weight."""
        ...

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        """Return the companions of a weight of this shape, by template.

        Raises:
          ValueError: the scheme has no such weights, such as groups that do not divide the inputs.
        """
        ...

    def decode(self, stored: Stored) -> np.ndarray:
        """Return the weight in float32.

        Raises:
          CheckpointError: a tensor has values that the scheme does not have.
        """
        ...
