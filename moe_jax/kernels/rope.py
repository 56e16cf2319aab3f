"""Rotary position embedding (Su et al., arXiv:2104.09864) and its scalings for long contexts.

T  rows     H  heads     d  head width     f  frequencies, one for each rotated pair
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
    """Cosines and sines of the angles at each row's position, the same for all heads."""

    cos: Float[Array, "T 1 f"]
    sin: Float[Array, "T 1 f"]


@dataclass(frozen=True)
class Rotary:
    """Rotate pairs of each head's first numbers by position times frequency, in float32."""

    config: RopeConfig
    head_dim: int

    def at(self, positions: Int32[Array, "T"]) -> CosSin:
        """Compute the cosines and sines at positions."""
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
        """Frequency of each pair, in radians per position."""
        width = self.head_dim if self.config.width is None else self.config.width
        return _scaled(_frequencies(self.config.theta, width), self.config).astype(np.float32)

    @property
    def amplitude(self) -> float:
        """Factor of the cosines and sines."""
        scaling = self.config.scaling
        return scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0

    def _pairs(self, x: Float[Array, "T H _"]) -> tuple[Float[Array, "T H f"], Float[Array, "T H f"]]:
        if self.config.interleaved:
            return x[..., ::2], x[..., 1::2]
        first, second = jnp.split(x, 2, axis=-1)
        return first, second

    def _join(self, first: Float[Array, "T H f"], second: Float[Array, "T H f"]) -> Float[Array, "T H _"]:
        if self.config.interleaved:
            return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
        return jnp.concatenate([first, second], axis=-1)


def _frequencies(theta: float, width: int) -> Float[np.ndarray, "f"]:
    """Compute `theta ** (-2i / width)` for each pair i."""
    return theta ** (-np.arange(0, width, 2) / width)


def _scaled(frequencies: Float[np.ndarray, "f"], config: RopeConfig) -> Float[np.ndarray, "f"]:
    """Apply the config's scaling to frequencies."""
    scaling: RopeScaling | None = config.scaling
    width = 2 * len(frequencies)
    match scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case NTKScaling(alpha):
            return _frequencies(config.theta * alpha ** (width / (width - 2)), width)
        case LongRopeScaling(factors):
            return frequencies / np.array(factors)
        case Llama3Scaling(factor, low, high, original_positions):
            turns = original_positions * frequencies / (2 * math.pi)
            return _interpolated(frequencies, factor, kept=(turns - low) / max(high - low, 1e-9))
        case YarnScaling(factor):
            return _interpolated(frequencies, factor, kept=1 - _yarn_ramp(scaling, config.theta, width))


def _interpolated(
    frequencies: Float[np.ndarray, "f"], factor: float, kept: Float[np.ndarray, "f"]
) -> Float[np.ndarray, "f"]:
    """Mix each frequency with its quotient by `factor`; `kept`, from 0 to 1, is the share of the frequency itself."""
    kept = np.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def _yarn_ramp(scaling: YarnScaling, theta: float, width: int) -> Float[np.ndarray, "f"]:
    """Ramp from 0, at the pair that turns `fast` times within the original positions, to 1, at `slow` times.

    The ramp stays at 0 or below where no pair turns `slow` times, as in transformers.
    """

    def pair(turns: float) -> float:
        """Fractional index of the pair that turns so often."""
        return width * math.log(scaling.original_positions / (2 * math.pi * turns)) / (2 * math.log(theta))

    first, last = pair(scaling.fast), pair(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    return (np.arange(width // 2) - first) / (last - first or 1e-3)
