"""Four-bit floats (E2M1), two in a byte, with scales for groups of inputs.

MXFP4 has groups of 32 inputs whose scales are exponents (OCP Microscaling Formats 1.0). NVFP4 has groups of 16 inputs
with scales in float8, and one scale for the whole weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.checkpoints.formats.codes import E2M1, EXPONENTS, scales_of, unpack
from moe_jax.checkpoints.formats.scheme import Companion, Shape, Stored
from moe_jax.checkpoints.tensor_files import EIGHT_BITS

NVFP4_GROUP, MXFP4_GROUP = 16, 32


@dataclass(frozen=True)
class NVFP4:
    """Four-bit floats, scales in float8, and a scale of the weight."""

    codes: str
    whole: str
    """Template of the name of the scale of the weight."""
    divides: bool
    """Divide by the scale of the weight, as compressed-tensors does; modelopt multiplies."""
    dtype: str = "U8"
    scales: str = "{weight}_scale"

    def weight_shape(self, stored: Stored) -> Shape:
        *outer, half = stored.shape(self.codes)
        return *outer, 2 * half

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        scales = Companion(groups(shape, NVFP4_GROUP), (EIGHT_BITS,))
        return {self.scales: scales, self.whole: Companion(shape[:-2], ("F32",))}

    def decode(self, stored: Stored) -> np.ndarray:
        scales = scales_of(stored.read(self.scales))
        whole = stored.read(self.whole).reshape(*scales.shape[:-2], 1, 1)
        scales = scales / whole if self.divides else scales * whole
        return times_groups(E2M1[unpack(stored.read(self.codes), 4)], scales)


@dataclass(frozen=True)
class MXFP4:
    """Four-bit floats, and scales that are powers of two."""

    codes: str = "{weight}_packed"
    scales: str = "{weight}_scale"
    dtype: str = "U8"

    def weight_shape(self, stored: Stored) -> Shape:
        *outer, half = stored.shape(self.codes)
        return *outer, 2 * half

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        return {self.scales: Companion(groups(shape, MXFP4_GROUP), EXPONENTS)}

    def decode(self, stored: Stored) -> np.ndarray:
        return times_groups(E2M1[unpack(self._flat_codes(stored), 4)], scales_of(stored.read(self.scales)))

    def _flat_codes(self, stored: Stored) -> np.ndarray:
        return stored.read(self.codes)


@dataclass(frozen=True)
class GroupedMXFP4(MXFP4):
    """Four-bit floats of gpt-oss: the codes have a dimension for the groups, `[experts, outputs, groups, 16]`.

    The weight has its inputs before its outputs, as the family's other checkpoints have it.
    """

    codes: str = "{weight}_blocks"
    scales: str = "{weight}_scales"

    def weight_shape(self, stored: Stored) -> Shape:
        *experts, outputs, count, half = stored.shape(self.codes)
        return *experts, 2 * half * count, outputs

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        *experts, inputs, outputs = shape
        return super().companions((*experts, outputs, inputs))

    def decode(self, stored: Stored) -> np.ndarray:
        return np.swapaxes(super().decode(stored), -1, -2)

    def _flat_codes(self, stored: Stored) -> np.ndarray:
        codes = stored.read(self.codes)
        return codes.reshape(*codes.shape[:-2], -1)


def groups(shape: Shape, size: int) -> Shape:
    """Return the shape of the scales of a weight with groups of `size` inputs."""
    *outer, inputs = shape
    if inputs % size:
        raise ValueError(f"groups of {size} do not divide {inputs} inputs")
    return *outer, inputs // size


def times_groups(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Multiply each group of inputs by its scale."""
    grouped = numbers.reshape(*scales.shape, -1)
    return (grouped * scales[..., None]).reshape(numbers.shape)
