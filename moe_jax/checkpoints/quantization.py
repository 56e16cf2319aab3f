"""Block-quantized float8 checkpoints, as published for DeepSeek and Qwen models.

A float8_e4m3fn weight `[O, I]` has a second tensor, `..._scale_inv`: float32 `[ceil(O / A), ceil(I / B)]`, one scale
for each block `[A, B]`. The dequantized weight is weight times scale (DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.tensor_files import EIGHT_BITS
from moe_jax.errors import CheckpointError

FIELD, SCALES = "quantization_config", "_scale_inv"

Shapes = Mapping[str, tuple[tuple[int, ...], str]]


class Tensors(Protocol):
    """A collection of named tensors."""

    def shapes(self) -> Shapes:
        """Return the shape and the dtype of each tensor; the dtype has its safetensors name, such as `BF16`."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Return one tensor."""
        ...


@dataclass(frozen=True)
class BlockScales:
    """Block quantization: one scale for each block of a weight `[outputs, inputs]`."""

    block: tuple[int, int]
    """Outputs and inputs of a block, `weight_block_size` in the config."""

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a weight."""
        return tuple(-(-size // block) for size, block in zip(weight, self.block, strict=True))

    @property
    def square_block(self) -> int:
        """Side of the square blocks that divide every block: numbers within a square share their scale."""
        return math.gcd(*self.block)

    def spread(self, scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Repeat the scales to the shape of their weight: one scale for each number."""
        for dim, (block, size) in enumerate(zip(self.block, shape, strict=True)):
            scales = np.repeat(scales, block, axis=dim)[(slice(None),) * dim + (slice(size),)]
        return scales


def read_quantization(fields: Fields) -> BlockScales | None:
    """Read `quantization_config`; return `None` for a checkpoint that is not quantized."""
    inner = fields.inner(FIELD)
    if not fields.has(FIELD):
        return None
    inner.ignore("activation_scheme")  # activations are not quantized
    inner.ignore("modules_to_not_convert", "ignored_layers")  # the dtype of each tensor shows what is quantized
    inner.expect("quant_method", "fp8")
    inner.expect("fmt", "e4m3")
    block = inner.take_list("weight_block_size", int)
    if len(block) != 2 or min(block) < 1:
        fields.problem(f"{FIELD}.weight_block_size must be two sizes, got {block}")
        return None
    return BlockScales((block[0], block[1]))


class DequantizedTensors:
    """The tensors of a block-quantized checkpoint, dequantized to float32.

    Raises:
      CheckpointError: scales are missing or have the wrong shape.
    """

    def __init__(self, files: Tensors, scales: BlockScales) -> None:
        self._files, self._scales = files, scales
        self._shapes = files.shapes()
        problems = [problem for name in self._shapes if (problem := self._problem(name))]
        if problems:
            raise CheckpointError("scales of eight-bit weights are missing or misshapen:\n  " + "\n  ".join(problems))

    def shapes(self) -> Shapes:
        """Return the shape and the dtype of each tensor after dequantization; scales are left out."""
        return {
            name: (shape, "F32" if dtype == EIGHT_BITS else dtype)
            for name, (shape, dtype) in self._shapes.items()
            if not self._is_scale(name)
        }

    def read(self, name: str) -> np.ndarray:
        """Return one tensor, dequantized."""
        tensor = self._files.read(name)
        return tensor.astype(np.float32) * self.scales(name) if self._in_eight_bits(name) else tensor

    def all_in_eight_bits(self, names: Iterable[str]) -> bool:
        """Return True if all these tensors are quantized."""
        return all(map(self._in_eight_bits, names))

    def numbers(self, name: str) -> np.ndarray:
        """Return a quantized weight as it is in the file, its bits viewed as int8."""
        return self._files.read(name).view(np.int8)

    def scales(self, name: str) -> np.ndarray:
        """Return the scale of each number of a quantized weight, in the shape of the weight."""
        return self._scales.spread(self._files.read(name + SCALES), self._shapes[name][0])

    def _in_eight_bits(self, name: str) -> bool:
        return self._shapes[name][1] == EIGHT_BITS

    def _is_scale(self, name: str) -> bool:
        weight = self._shapes.get(name.removesuffix(SCALES)) if name.endswith(SCALES) else None
        return weight is not None and weight[1] == EIGHT_BITS

    def _problem(self, name: str) -> str | None:
        shape, dtype = self._shapes[name]
        if dtype != EIGHT_BITS:
            return None
        found = self._shapes.get(name + SCALES, (None, ""))[0]
        expected = self._scales.shape(shape) if len(shape) == 2 else None
        return None if found is not None and found == expected else f"{name}{SCALES}: expected {expected}, got {found}"
