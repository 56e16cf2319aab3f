"""How hidden rows are written while they are gathered: as they are, or in a byte per number with scales.

T  rows     D  hidden     b  blocks of a row that have a scale each

Only what is gathered loses precision; sums over devices stay in the compute dtype. Every scale is of one block of one
row, so that no row, pad rows included, changes another's bits.
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
    """To bytes and back."""

    @abstractmethod
    def encode(self, x: Float[Array, "T D"]) -> tuple[Array, Float[Array, "T b"]]:
        """What is sent, and the scales that are sent beside it."""

    @abstractmethod
    def decode(self, sent: Shaped[Array, "T D"], scales: Float[Array, "T b"], dtype: DTypeLike) -> Float[Array, "T D"]:
        """The rows."""

    @abstractmethod
    def row_bytes(self, hidden: int, dtype: DTypeLike) -> tuple[int, int]:
        """Of what is sent, and of its scales."""


@dataclass(frozen=True)
class Exact(Encoding):
    """As they are."""

    def encode(self, x: Float[Array, "T D"]) -> tuple[Array, Float[Array, "T b"]]:
        return x, jnp.zeros((x.shape[0], 0), jnp.float32)

    def decode(self, sent: Shaped[Array, "T D"], scales: Float[Array, "T b"], dtype: DTypeLike) -> Float[Array, "T D"]:
        return sent

    def row_bytes(self, hidden: int, dtype: DTypeLike) -> tuple[int, int]:
        return hidden * jnp.dtype(dtype).itemsize, 0


@dataclass(frozen=True)
class Scaled(Encoding):
    """As numbers of one byte, each block divided by its scale; for decoding only, as rounding has no gradient.

    What is sent has the type of bytes, so that every collective carries it: a sum of packed rows, in which each row is
    zero on all devices but one, is exact.
    """

    dtype: str
    largest: float

    def encode(self, x: Float[Array, "T D"]) -> tuple[Array, Float[Array, "T b"]]:
        blocks = x.astype(jnp.float32).reshape(x.shape[0], _blocks(x.shape[1]), -1)
        scales = jnp.max(jnp.abs(blocks), axis=-1) / self.largest
        # A scale that is no normal number is rounded too much to divide by.
        scaled = blocks / jnp.where(scales >= jnp.finfo(jnp.float32).tiny, scales, jnp.inf)[..., None]
        small = (jnp.round(scaled) if jnp.issubdtype(self.dtype, jnp.integer) else scaled).astype(self.dtype)
        return lax.bitcast_convert_type(small, jnp.uint8).reshape(x.shape), scales

    def decode(self, sent: Shaped[Array, "T D"], scales: Float[Array, "T b"], dtype: DTypeLike) -> Float[Array, "T D"]:
        small = lax.bitcast_convert_type(sent, jnp.dtype(self.dtype)).reshape(*scales.shape, -1)
        return (small.astype(jnp.float32) * scales[..., None]).astype(dtype).reshape(sent.shape)

    def row_bytes(self, hidden: int, dtype: DTypeLike) -> tuple[int, int]:
        return hidden, _blocks(hidden) * jnp.dtype(jnp.float32).itemsize


EXACT = Exact()
ENCODINGS: dict[str, Encoding] = {
    "exact": EXACT,
    "float8_e4m3fn": Scaled("float8_e4m3fn", 448.0),
    "int8": Scaled("int8", 127.0),
}
"""By the name that users ask for."""


def as_encoding(name: str) -> Encoding:
    """
    Raises:
      ConfigError: no such encoding.
    """
    if not isinstance(name, str) or name not in ENCODINGS:
        raise ConfigError(f"gather_dtype must be {', '.join(ENCODINGS)}, got {name!r}")
    return ENCODINGS[name]


def _blocks(hidden: int) -> int:
    """How many scales a row has: one for each `BLOCK` numbers, or for all where these do not divide."""
    return 1 if hidden % BLOCK else hidden // BLOCK
