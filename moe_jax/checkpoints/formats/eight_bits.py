"""Eight-bit weights: numbers in a tensor of the weight's name and shape, and a tensor of scales.

Block quantization in float8 is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3). MXFP8 has blocks of 32 inputs whose
scales are exponents (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.checkpoints.formats.codes import EXPONENTS, FLOATS, scales_of, spread
from moe_jax.checkpoints.formats.scheme import Companion, Shape, Stored
from moe_jax.checkpoints.tensor_files import EIGHT_BITS

INT8 = "I8"


@dataclass(frozen=True)
class EightBits:
    """Numbers of eight bits times scales, one for each block of numbers."""

    scales: str
    """Template of the name of the scales."""
    block: tuple[int | None, int | None]
    """Outputs and inputs of a block; `None` for all of them."""
    dtype: str = EIGHT_BITS
    codes: str = "{weight}"

    def weight_shape(self, stored: Stored) -> Shape:
        return stored.shape(self.codes)

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        if len(shape) not in (2, 3):
            raise ValueError(f"only matrices are quantized, got shape {list(shape)}")
        blocks = self._blocks(shape)
        counts = tuple(-(-size // block) for size, block in zip(shape, blocks, strict=True))
        return {self.scales: Companion(counts, FLOATS + EXPONENTS)}

    def decode(self, stored: Stored) -> np.ndarray:
        return stored.read(self.codes).astype(np.float32) * self.spread_scales(stored)

    def spread_scales(self, stored: Stored) -> np.ndarray:
        """Return the scale of each number, in a shape that broadcasts to that of the weight."""
        shape = self.weight_shape(stored)
        scales = scales_of(stored.read(self.scales))
        return spread(scales.reshape(self.companions(shape)[self.scales].shape), self._blocks(shape), shape)

    @property
    def square_block(self) -> int | None:
        """Side of the square blocks that divide every block: numbers within a square share their scale.

        `None` if a scale serves all inputs.
        """
        return None if self.block[1] is None else math.gcd(self.block[1], self.block[0] or 0)

    def _blocks(self, shape: Shape) -> Shape:
        blocks = zip(shape[-2:], self.block, strict=True)
        return (1,) * (len(shape) - 2) + tuple(size if block is None else block for size, block in blocks)
