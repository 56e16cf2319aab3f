"""Rotary position embedding and its context extensions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: divide positions by a factor (Chen et al., arXiv:2306.15595)."""

    factor: float
    """`factor`: divisor of positions."""

    def __post_init__(self) -> None:
        check_positive(self, "factor")


@dataclass(frozen=True)
class NTKScaling:
    """NTK-aware scaling: a larger base divides the lowest frequency by `alpha` and keeps the highest."""

    alpha: float
    """`alpha`: divisor of the lowest frequency."""

    def __post_init__(self) -> None:
        check_positive(self, "alpha")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: divide low frequencies by a factor, keep high ones, blend those between (Peng et al., arXiv:2309.00071)."""

    factor: float
    """`factor`: divisor of low frequencies."""
    original_positions: int
    """`original_max_position_embeddings`: longest sequence before the extension, in tokens."""
    attention_factor: float
    """`attention_factor`: factor on rotated queries and keys."""
    fast: float = 32.0
    """`beta_fast`: frequencies with more turns than this within the original positions are kept."""
    slow: float = 1.0
    """`beta_slow`: frequencies with fewer turns than this within the original positions are divided."""
    truncate: bool = True
    """`truncate`: round the ends of the blended range outwards to whole frequencies."""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "original_positions", "attention_factor", "fast", "slow")


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE: divide each frequency by its own factor (Ding et al., arXiv:2402.13753)."""

    factors: tuple[float, ...]
    """`long_factor` or `short_factor`: divisor of each frequency."""
    attention_factor: float
    """`attention_factor`: factor on rotated queries and keys."""

    def __post_init__(self) -> None:
        check_positive(self, "attention_factor")
        if not all(0 < factor < math.inf for factor in self.factors):
            raise ConfigError(f"LongRopeScaling.factors must be positive and finite, got {self.factors}")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 scaling: divide low frequencies by a factor, keep high ones, blend those between."""

    factor: float
    """`factor`: divisor of low frequencies."""
    low: float
    """`low_freq_factor`: frequencies with fewer turns than this within the original positions are divided."""
    high: float
    """`high_freq_factor`: frequencies with more turns than this within the original positions are kept."""
    original_positions: int
    """`original_max_position_embeddings`: longest sequence before the extension, in tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "factor", "low", "high", "original_positions")
        if self.low > self.high:
            raise ConfigError(f"Llama3Scaling.low must be at most high, got {self.low} and {self.high}")


RopeScaling = LinearScaling | NTKScaling | YarnScaling | LongRopeScaling | Llama3Scaling
"""`rope_scaling`: context extension of the rotary embedding."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (Su et al., arXiv:2104.09864)."""

    theta: float
    """`rope_theta`: base of the frequencies."""
    width: int | None = None
    """`rotary_dim`: number of leading channels of each head to rotate; `None` for all."""
    interleaved: bool = False
    """`rope_interleave`: rotate neighbouring channels (0, 1) as a pair, rather than channels (0, width/2)."""
    scaling: RopeScaling | None = None
    """`rope_scaling`: context extension; `None` for no extension."""

    def __post_init__(self) -> None:
        check_positive(self, "theta", "width")
        if isinstance(self.scaling, YarnScaling) and self.theta <= 1:
            raise ConfigError(f"YaRN needs falling frequencies: rope_theta must be above 1, got {self.theta}")


def check_rotated(rope: RopeConfig, head_dim: int) -> None:
    """Raise `ConfigError` unless the rotary embedding fits heads of width `head_dim`."""
    width = head_dim if rope.width is None else rope.width
    if width % 2 or width > head_dim:
        name, bound = ("head_dim", "") if rope.width is None else ("RopeConfig.width", f" and at most {head_dim}")
        raise ConfigError(f"rotary embedding rotates pairs of channels: {name} must be even{bound}, got {width}")
    if isinstance(rope.scaling, NTKScaling) and width == 2:
        raise ConfigError(
            "NTK scaling keeps the first frequency and stretches the last: the rotated width must be above 2"
        )
    if isinstance(rope.scaling, LongRopeScaling) and len(rope.scaling.factors) != width // 2:
        raise ConfigError(f"{width // 2} frequencies need {width // 2} factors, got {len(rope.scaling.factors)}")
