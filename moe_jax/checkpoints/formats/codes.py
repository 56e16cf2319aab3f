"""Decoding of packed numbers, scales and exponents."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""Numbers of the four-bit float (OCP Microscaling Formats 1.0, section 5.3.3), by code."""
FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")
"""Dtypes of scales that are powers of two, stored as biased exponents."""


def unpack(words: np.ndarray, bits: int, dim: int = -1, order: Sequence[int] | None = None) -> np.ndarray:
    """Split words into codes of four or eight bits, the lowest bits first: `[..., n]` becomes `[..., n * codes]`.

    Args:
      words: unsigned or signed integers.
      bits: bits of a code.
      dim: dimension along which the codes are packed.
      order: which code of a word each place of the result takes; by default in order.
    """
    moved = np.ascontiguousarray(np.moveaxis(words, dim, -1))
    codes = moved.view(np.uint8)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    codes = codes.reshape(*moved.shape, -1)
    if order is not None:
        codes = codes[..., list(order)]
    return np.moveaxis(codes.reshape(*moved.shape[:-1], -1), -1, dim)


def scales_of(tensor: np.ndarray) -> np.ndarray:
    """Return scales in float32. Integers are the biased exponents of powers of two."""
    return (tensor.view(ml_dtypes.float8_e8m0fnu) if tensor.dtype == np.uint8 else tensor).astype(np.float32)


def spread(scales: np.ndarray, block: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Repeat scales to the shape of their weight: each is for a block of neighbouring numbers."""
    for dim, (size, whole) in enumerate(zip(block, shape, strict=True)):
        if scales.shape[dim] == 1:
            continue
        scales = np.repeat(scales, size, axis=dim)[(slice(None),) * dim + (slice(whole),)]
    return scales
