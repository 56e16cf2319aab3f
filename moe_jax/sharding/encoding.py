"""Encodings of hidden rows for the gather: in the compute dtype, or in one byte per number with scales.

T  rows     D  hidden     b  blocks of a row that have a scale each

Only the gather loses precision; sums over devices stay in the compute dtype. Each scale belongs to one block of one
row, so no row, pad rows included, changes the bits of another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from moe_jax.errors import ConfigError

BLOCK = 128
"""Numbers that share a scale, as in DeepSeek-V3's activations (arXiv:2412.19437, section 3.3.2)."""


class Encoding(ABC):
    """Encode rows before they are gathered, and decode them afterwards."""

    @abstractmethod
    def encode(self, x: Float[Array, "T D"]) -> tuple[Array, Float[Array, "T b"]]:
        """Return the encoded rows and their scales."""

    @abstractmethod
    def decode(
        self, encoded: Shaped[Array, "T D"], scales: Float[Array, "T b"], dtype: DTypeLike
    ) -> Float[Array, "T D"]:
        """Decode rows to `dtype`."""

    @abstractmethod
    def row_bytes(self, hidden: int, dtype: DTypeLike) -> tuple[int, int]:
        """Return the bytes of an encoded row and the bytes of its scales."""


@dataclass(frozen=True)
class Exact(Encoding):
    """Rows in the compute dtype, without scales."""

    def encode(self, x: Float[Array, "T D"]) -> tuple[Array, Float[Array, "T b"]]:
        return x, jnp.zeros((x.shape[0], 0), jnp.float32)

    def decode(
        self, encoded: Shaped[Array, "T D"], scales: Float[Array, "T b"], dtype: DTypeLike
    ) -> Float[Array, "T D"]:
        return encoded

    def row_bytes(self, hidden: int, dtype: DTypeLike) -> tuple[int, int]:
        return hidden * jnp.dtype(dtype).itemsize, 0


@dataclass(frozen=True)
class Scaled(Encoding):
    """Rows in one byte per number, each block divided by its scale. For decoding only: rounding has no gradient.

    The encoded rows have dtype uint8, which every collective supports. A sum of packed rows, in which each row is zero
    on all devices but one, is exact.
    """

    dtype: str

    def encode(self, x: Float[Array, "T D"]) -> tuple[Array, Float[Array, "T b"]]:
        is_integer = jnp.issubdtype(self.dtype, jnp.integer)
        largest = float((jnp.iinfo if is_integer else jnp.finfo)(self.dtype).max)
        blocks = x.astype(jnp.float32).reshape(x.shape[0], _blocks(x.shape[1]), -1)
        scales = jnp.max(jnp.abs(blocks), axis=-1) / largest
        # A subnormal scale has too few significant bits to divide by: such blocks become zero.
        scaled = blocks / jnp.where(scales >= jnp.finfo(jnp.float32).tiny, scales, jnp.inf)[..., None]
        numbers = (jnp.round(scaled) if is_integer else scaled).astype(self.dtype)
        return lax.bitcast_convert_type(numbers, jnp.uint8).reshape(x.shape), scales

    def decode(
        self, encoded: Shaped[Array, "T D"], scales: Float[Array, "T b"], dtype: DTypeLike
    ) -> Float[Array, "T D"]:
        numbers = lax.bitcast_convert_type(encoded, jnp.dtype(self.dtype)).reshape(*scales.shape, -1)
        return (numbers.astype(jnp.float32) * scales[..., None]).astype(dtype).reshape(encoded.shape)

    def row_bytes(self, hidden: int, dtype: DTypeLike) -> tuple[int, int]:
        return hidden, _blocks(hidden) * jnp.dtype(jnp.float32).itemsize


EXACT = Exact()
DEFAULT_GATHER_DTYPE = "exact"
ENCODINGS: dict[str, Encoding] = {
    DEFAULT_GATHER_DTYPE: EXACT,
    "float8_e4m3fn": Scaled("float8_e4m3fn"),
    "int8": Scaled("int8"),
}
"""Encodings by the value of the option `gather_dtype`."""


def as_encoding(name: str) -> Encoding:
    """Return the encoding with a name.

    Raises:
      ConfigError: no such encoding.
    """
    if not isinstance(name, str) or name not in ENCODINGS:
        raise ConfigError(f"gather_dtype must be {', '.join(ENCODINGS)}, got {name!r}")
    return ENCODINGS[name]


def _blocks(hidden: int) -> int:
    """Number of scales of a row: one per `BLOCK` numbers, or one in all if `BLOCK` does not divide the row."""
    return 1 if hidden % BLOCK else hidden // BLOCK
