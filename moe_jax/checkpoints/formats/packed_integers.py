"""Four- and eight-bit integers packed in words of 32 bits, with scales and zero points for groups of inputs.

Sources: compressed-tensors (`pack-quantized`), AWQ (arXiv:2306.00978) and GPTQ (arXiv:2210.17323).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.checkpoints.formats.codes import FLOATS, unpack
from moe_jax.checkpoints.formats.four_bit_floats import groups, times_groups
from moe_jax.checkpoints.formats.scheme import Companion, Shape, Stored

WORD = 32
"""Bits of a word."""
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in the word of each of eight neighbouring outputs, as AWQ's kernels want it."""


@dataclass(frozen=True)
class PackedIntegers:
    """Integers of compressed-tensors: words along the inputs, each code plus half its range."""

    bits: int
    group: int | None
    """Inputs of a group; `None` for all inputs."""
    symmetric: bool
    """The integers have no zero points."""
    ordered: bool
    """Each input names its group."""
    codes: str = "{weight}_packed"
    dtype: str = "I32"
    scales: str = "{weight}_scale"
    zeros: str = "{weight}_zero_point"
    shape: str = "{weight}_shape"
    group_of: str = "{weight}_g_idx"

    def weight_shape(self, stored: Stored) -> Shape:
        *outer, words = stored.shape(self.codes)
        return *outer, words * (WORD // self.bits)

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        scales = groups(shape, self.group or shape[-1])
        expected = {self.scales: Companion(scales, FLOATS), self.shape: Companion((2,), ("I32", "I64"))}
        if not self.symmetric:
            packed = (*scales[:-2], -(-scales[-2] * self.bits // WORD), scales[-1])
            expected[self.zeros] = Companion(packed, ("I32",))
        if self.ordered:
            expected[self.group_of] = Companion(shape[-1:], ("I32", "I64"))
        return expected

    def decode(self, stored: Stored) -> np.ndarray:
        shape, half = self.weight_shape(stored), 2 ** (self.bits - 1)
        if tuple(written := stored.read(self.shape).tolist()) != shape[-2:]:
            raise stored.refuse(self.shape, f"says {written}, the packed weight has {list(shape[-2:])}")
        numbers = unpack(stored.read(self.codes), self.bits).astype(np.float32) - half
        scales = stored.read(self.scales).astype(np.float32)
        zeros = np.zeros((1,) * scales.ndim, np.float32)
        if not self.symmetric:
            zeros = unpack(stored.read(self.zeros), self.bits, -2)[..., : scales.shape[-2], :].astype(np.float32) - half
        if self.ordered:
            group_of = group_indices(stored, self.group_of, scales.shape[-1])
            return (numbers - np.broadcast_to(zeros, scales.shape)[..., group_of]) * scales[..., group_of]
        grouped = numbers.reshape(*scales.shape, -1) - zeros[..., None]
        return times_groups(grouped.reshape(shape), scales)


@dataclass(frozen=True)
class AWQ:
    """Integers of AWQ: words along the outputs, `[inputs, outputs]`."""

    group: int | None
    bits: int = 4
    codes: str = "{module}.qweight"
    dtype: str = "I32"
    scales: str = "{module}.scales"
    zeros: str = "{module}.qzeros"

    def weight_shape(self, stored: Stored) -> Shape:
        inputs, words = stored.shape(self.codes)
        return words * (WORD // self.bits), inputs

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        outputs, count = groups(shape, self.group or shape[-1])
        return {
            self.scales: Companion((count, outputs), FLOATS),
            self.zeros: Companion((count, outputs * self.bits // WORD), ("I32",)),
        }

    def decode(self, stored: Stored) -> np.ndarray:
        numbers, zeros = (unpack(stored.read(each), self.bits, order=INTERLEAVED) for each in (self.codes, self.zeros))
        scales = stored.read(self.scales).astype(np.float32)
        grouped = numbers.reshape(len(scales), -1, scales.shape[1]).astype(np.float32) - zeros[:, None]
        return (grouped * scales[:, None]).reshape(numbers.shape).T


@dataclass(frozen=True)
class GPTQ:
    """Integers of GPTQ: words along the inputs, `[inputs, outputs]`; each input names its group."""

    bits: int
    group: int | None
    zero_offset: int
    """Number to add to a stored zero point: 1 in the first version of the format, 0 in the second."""
    codes: str = "{module}.qweight"
    dtype: str = "I32"
    scales: str = "{module}.scales"
    zeros: str = "{module}.qzeros"
    group_of: str = "{module}.g_idx"

    def weight_shape(self, stored: Stored) -> Shape:
        words, outputs = stored.shape(self.codes)
        return outputs, words * (WORD // self.bits)

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        outputs, inputs = shape
        count = -(-inputs // (self.group or inputs))
        return {
            self.scales: Companion((count, outputs), FLOATS),
            self.zeros: Companion((count, outputs * self.bits // WORD), ("I32",)),
            self.group_of: Companion((inputs,), ("I32",), is_optional=True),
        }

    def decode(self, stored: Stored) -> np.ndarray:
        numbers = unpack(stored.read(self.codes), self.bits, 0).astype(np.float32)
        zeros = (unpack(stored.read(self.zeros), self.bits) + self.zero_offset) & 2**self.bits - 1
        scales = stored.read(self.scales).astype(np.float32)
        if stored.has(self.group_of):
            group_of = group_indices(stored, self.group_of, len(scales))
        else:
            group_of = np.arange(len(numbers)) // (self.group or len(numbers))
        return ((numbers - zeros.astype(np.float32)[group_of]) * scales[group_of]).T


def group_indices(stored: Stored, template: str, count: int) -> np.ndarray:
    """Read the group of each input.

    Raises:
      CheckpointError: an index is out of range.
    """
    indices = stored.read(template)
    if indices.min() < 0 or indices.max() >= count:
        raise stored.refuse(template, f"names groups {indices.min()} to {indices.max()} of {count}")
    return indices
