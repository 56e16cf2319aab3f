"""Attention, as choices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.config.rope import LongRopeScaling, RopeConfig
from moe_jax.errors import ConfigError


class QKNorm(Enum):
    """What RMS-normalises queries and keys."""

    HEAD = auto()
    """Each head, before the rotary embedding."""
    ROTATED_HEAD = auto()
    """Each head, after the rotary embedding."""
    PROJECTION = auto()
    """All heads together, before the rotary embedding."""


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    """`None` where positions are not embedded."""
    bias: bool = False
    """Whether the query, key and value projections add a bias."""
    output_bias: bool = False
    qk_norm: QKNorm | None = None
    clip: float | None = None
    """Projected queries, keys and values are limited to plus and minus this."""
    scale: float | None = None
    """By which scores are multiplied; `None` for `head_dim ** -0.5`."""
    sinks: bool = False
    """Whether each head has one more score, a parameter, in its softmax, that goes to no value (Xiao et al.,
    arXiv:2309.17453)."""
    window: int | None = None
    """Sliding window: a position sees itself and the `window - 1` before it. `None` sees all before it."""

    def __post_init__(self) -> None:
        check_positive(self, "heads", "kv_heads", "head_dim", "clip", "scale", "window")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} KV heads evenly")
        if self.rope is not None:
            _check_rotated(self.rope, self.head_dim)


def _check_rotated(rope: RopeConfig, head_dim: int) -> None:
    width = head_dim if rope.width is None else rope.width
    if width % 2 or width > head_dim:
        name = "head_dim" if rope.width is None else f"the width rotated of head_dim {head_dim}"
        raise ConfigError(f"rotary embedding rotates pairs: {name} must be even, got {width}")
    if isinstance(rope.scaling, LongRopeScaling) and len(rope.scaling.factors) != width // 2:
        raise ConfigError(f"{width // 2} frequencies need as many factors, got {len(rope.scaling.factors)}")
