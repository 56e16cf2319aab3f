"""Rotary position embedding (Su et al., arXiv:2104.09864), and the ways to stretch it.

T  rows     H  heads     d  head width     f  frequencies, one for each pair that is rotated
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from moe_jax.config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)


class CosSin(NamedTuple):
    """Of the angles at rows' positions: the same for all heads, and all layers that rotate alike."""

    cos: Float[Array, "T 1 f"]
    sin: Float[Array, "T 1 f"]


@dataclass(frozen=True)
class Rotary:
    """Rotates pairs of each head's first numbers by position times frequency, in float32."""

    config: RopeConfig
    head_dim: int

    def at(self, positions: Int32[Array, "T"]) -> CosSin:
        angles = positions.astype(jnp.float32)[:, None, None] * self.frequencies
        return CosSin(jnp.cos(angles) * self.amplitude, jnp.sin(angles) * self.amplitude)

    def __call__(self, x: Float[Array, "T H d"], at: CosSin) -> Float[Array, "T H d"]:
        cos, sin = at
        rotated, rest = jnp.split(x, [2 * len(self.frequencies)], axis=-1)
        first, second = self._pairs(rotated.astype(jnp.float32))
        joined = self._join(first * cos - second * sin, second * cos + first * sin).astype(x.dtype)
        return jnp.concatenate([joined, rest], axis=-1)

    @cached_property
    def frequencies(self) -> Float[np.ndarray, "f"]:
        """In radians per position."""
        width = self.head_dim if self.config.width is None else self.config.width
        return stretched(plain(self.config.theta, width), self.config).astype(np.float32)

    @property
    def amplitude(self) -> float:
        scaling = self.config.scaling
        return scaling.amplitude if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0

    def _pairs(self, x: Float[Array, "T H _"]) -> tuple[Float[Array, "T H f"], Float[Array, "T H f"]]:
        if self.config.interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = jnp.split(x, 2, axis=-1)
        return first, second

    def _join(self, first: Float[Array, "T H f"], second: Float[Array, "T H f"]) -> Float[Array, "T H _"]:
        if self.config.interleaved:
            return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
        return jnp.concatenate([first, second], axis=-1)


def plain(theta: float, width: int) -> Float[np.ndarray, "f"]:
    """`theta ** (-2i / width)` for each pair i."""
    return theta ** (-np.arange(0, width, 2) / width)


def stretched(frequencies: Float[np.ndarray, "f"], config: RopeConfig) -> Float[np.ndarray, "f"]:
    """The frequencies as the config's scaling changes them."""
    scaling: RopeScaling | None = config.scaling
    width = 2 * len(frequencies)
    match scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case NTKScaling(alpha):
            return plain(config.theta * alpha ** (width / (width - 2)), width)
        case LongRopeScaling(factors):
            return frequencies / np.array(factors)
        case Llama3Scaling(factor, low, high, original_positions):
            waves = original_positions * frequencies / (2 * math.pi)
            return _mix(frequencies, factor, kept=(waves - low) / max(high - low, 1e-9))
        case YarnScaling(factor):
            return _mix(frequencies, factor, kept=1 - _yarn_ramp(scaling, config.theta, width))


def _mix(frequencies: Float[np.ndarray, "f"], factor: float, kept: Float[np.ndarray, "f"]) -> Float[np.ndarray, "f"]:
    """Of each frequency the part `kept`, from 0 to 1, as it is, and the rest divided by the factor."""
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _yarn_ramp(scaling: YarnScaling, theta: float, width: int) -> Float[np.ndarray, "f"]:
    """From 0 at the frequency that turns `fast` times within the original positions to 1 at that of `slow` times.

    At most 0 where no frequency turns `slow` times, as in transformers.
    """

    def pair(turns: float) -> float:
        """The number, not whole, of the frequency that turns so often."""
        return width * math.log(scaling.original_positions / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair(scaling.fast), pair(scaling.slow)
    if scaling.whole_ends:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    return (np.arange(width // 2) - first) / (last - first or 1e-3)
