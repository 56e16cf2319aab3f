"""Rotary position embedding and the ways to stretch it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al., arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        check_positive(self, "factor")


@dataclass(frozen=True)
class NTKScaling:
    """A base that grows so that the lowest frequency is divided by `alpha`, and the highest stays."""

    alpha: float

    def __post_init__(self) -> None:
        check_positive(self, "alpha")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071): low frequencies divided by a factor, high ones kept, a ramp between."""

    factor: float
    original_positions: int
    """The longest sequence before the model was stretched."""
    attention_factor: float
    """By which rotated queries and keys are multiplied."""
    fast: float = 32.0
    """Frequencies that turn more often than this within the original positions are kept."""
    slow: float = 1.0
    """Those that turn less often are divided."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded to whole frequencies, outwards."""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "original_positions", "attention_factor", "fast", "slow")


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): each frequency divided by a factor of its own."""

    factors: tuple[float, ...]
    attention_factor: float
    """By which rotated queries and keys are multiplied."""

    def __post_init__(self) -> None:
        check_positive(self, "attention_factor")
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ConfigError(f"LongRopeScaling.factors must be positive and finite, got {self.factors}")


@dataclass(frozen=True)
class Llama3Scaling:
    """That of Llama 3.1: long waves are stretched by a factor, short ones kept, a ramp between."""

    factor: float
    low: float
    """Waves that fit less often than this into the original positions are stretched."""
    high: float
    """Those that fit more often are kept."""
    original_positions: int

    def __post_init__(self) -> None:
        check_positive(self, "factor", "low", "high", "original_positions")
        if self.low > self.high:
            raise ConfigError(f"Llama3Scaling.low must not be more than high, got {self.low} and {self.high}")


RopeScaling = LinearScaling | NTKScaling | YarnScaling | LongRopeScaling | Llama3Scaling


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864)."""

    theta: float
    width: int | None = None
    """How many numbers of each head are rotated, the first ones; `None` for all."""
    interleaved: bool = False
    """Whether pairs are neighbours, (0, 1), rather than halves apart, (0, width/2)."""
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_positive(self, "theta", "width")


def check_rotated(rope: RopeConfig, head_dim: int) -> None:
    """Raise `ConfigError` if heads of this width cannot be rotated so."""
    width = head_dim if rope.width is None else rope.width
    if width % 2 or width > head_dim:
        name = "head_dim" if rope.width is None else f"the width rotated of head_dim {head_dim}"
        raise ConfigError(f"rotary embedding rotates pairs: {name} must be even, got {width}")
    if isinstance(rope.scaling, LongRopeScaling) and len(rope.scaling.factors) != width // 2:
        raise ConfigError(f"{width // 2} frequencies need as many factors, got {len(rope.scaling.factors)}")
