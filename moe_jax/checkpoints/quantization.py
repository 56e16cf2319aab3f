"""Weights in eight bits with a scale for each block, as DeepSeek and Qwen publish them: read as the numbers they mean,
or as they are.

A weight `[O, I]` of float8_e4m3fn has beside it `..._scale_inv`, float32 `[ceil(O / A), ceil(I / B)]` for blocks of
`[A, B]`; the number meant is weight times scale (DeepSeek-V3, arXiv:2412.19437, section 3.3).
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
    """Tensors by name."""

    def shapes(self) -> Shapes:
        """Each tensor's shape and dtype, the latter as safetensors writes it."""
        ...

    def read(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True)
class BlockScales:
    """The form of the blocks."""

    block: tuple[int, int]

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of a weight."""
        return tuple(-(-size // of) for size, of in zip(weight, self.block, strict=True))

    @property
    def neighbours(self) -> int:
        """Of so many neighbours along either dimension, beginning at a multiple of it, all have the same scale."""
        return math.gcd(*self.block)

    def spread(self, scales: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The scale of each number of a weight of this shape."""
        for dim, (of, size) in enumerate(zip(self.block, shape, strict=True)):
            scales = np.repeat(scales, of, axis=dim)[(slice(None),) * dim + (slice(size),)]
        return scales


def read_quantization(fields: Fields) -> BlockScales | None:
    """What `config.json` says of it; `None` for weights that are held as they are meant."""
    inner = fields.inner(FIELD)
    if not fields.has(FIELD):
        return None
    for name in ("activation_scheme", "modules_to_not_convert", "ignored_layers"):
        inner.any(name, None)  # of rows, which are not quantised here; the files say which weights are
    inner.expect("quant_method", "fp8")
    inner.expect("fmt", "e4m3")
    block = inner.take_list("weight_block_size", int)
    if len(block) != 2 or min(block) < 1:
        fields.problem(f"{FIELD}.weight_block_size must be two sizes, got {block}")
        return None
    return BlockScales((block[0], block[1]))


class DequantizedTensors:
    """The tensors of files as the numbers that they mean, in float32 where they were in eight bits.

    Raises:
      CheckpointError: scales are missing, or not those of the blocks.
    """

    def __init__(self, files: Tensors, scales: BlockScales) -> None:
        self._files, self._scales = files, scales
        self._held = files.shapes()
        problems = [problem for name in self._held if (problem := self._problem(name))]
        if problems:
            raise CheckpointError("weights in eight bits without their scales:\n  " + "\n  ".join(problems))

    def shapes(self) -> Shapes:
        return {
            name: (shape, "F32" if dtype == EIGHT_BITS else dtype)
            for name, (shape, dtype) in self._held.items()
            if not self._is_scale(name)
        }

    def read(self, name: str) -> np.ndarray:
        tensor = self._files.read(name)
        return tensor.astype(np.float32) * self.scales(name) if self._in_eight_bits(name) else tensor

    def all_in_eight_bits(self, names: Iterable[str]) -> bool:
        return all(map(self._in_eight_bits, names))

    def numbers(self, name: str) -> np.ndarray:
        """The bits of a weight in eight bits."""
        return self._files.read(name).view(np.int8)

    def scales(self, name: str) -> np.ndarray:
        """Of each of its numbers."""
        return self._scales.spread(self._files.read(name + SCALES), self._held[name][0])

    def _in_eight_bits(self, name: str) -> bool:
        return self._held[name][1] == EIGHT_BITS

    def _is_scale(self, name: str) -> bool:
        of = self._held.get(name.removesuffix(SCALES)) if name.endswith(SCALES) else None
        return of is not None and of[1] == EIGHT_BITS

    def _problem(self, name: str) -> str | None:
        shape, dtype = self._held[name]
        if dtype != EIGHT_BITS:
            return None
        found = self._held.get(name + SCALES, (None, ""))[0]
        wanted = self._scales.shape(shape) if len(shape) == 2 else None
        return None if found is not None and found == wanted else f"{name}{SCALES}: expected {wanted}, got {found}"
