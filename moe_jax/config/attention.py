"""Attention, as choices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.config.rope import RopeConfig, check_rotated
from moe_jax.errors import ConfigError


class QKNorm(Enum):
    """What RMS-normalises queries and keys."""

    HEAD = auto()
    """Each head, before the rotary embedding."""
    ROTATED_HEAD = auto()
    """Each head, after the rotary embedding."""
    ROTATED_UNIT = auto()
    """Each head, after the rotary embedding, to unit mean square: without a weight."""
    PROJECTION = auto()
    """All heads together, before the rotary embedding."""


class OutputGate(Enum):
    """What has a gate of its own, a sigmoid of a projection of the row, that multiplies attention's output."""

    HEAD = auto()
    CHANNEL = auto()
    """Each number of each head."""


class Window(Enum):
    """Which positions up to its own a position sees, where it does not see all."""

    SLIDING = auto()
    """The last ones, its own included, as many as the window has."""
    CHUNKED = auto()
    """Those of its chunk: chunks of the window's size follow each other from position 0 on."""


@dataclass(frozen=True)
class QueryScalingConfig:
    """Queries that grow with their position p, times `1 + strength * ln(1 + floor((p + 1) / interval))` (Nakanishi,
    arXiv:2501.19399): a softmax over more positions would be flatter."""

    interval: int
    strength: float

    def __post_init__(self) -> None:
        check_positive(self, "interval", "strength")


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    """`None` where positions are not embedded."""
    value_dim: int | None = None
    """Width of a head's value; `None` for `head_dim`."""
    value_scale: float = 1.0
    """By which values are multiplied."""
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
    query_scaling: QueryScalingConfig | None = None
    window: int | None = None
    """A position sees no further back than the `window - 1` before it. `None` sees all before it."""
    window_kind: Window = Window.SLIDING
    block: int = 1
    """A position sees to the end of its block: blocks of so many positions follow each other from position 0 on. 1 for
    nothing after itself."""
    output_gate: OutputGate | None = None

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Numbers that the cache holds of each KV head and position, as keys and as values."""
        return self.head_dim, self.value_dim or self.head_dim

    def __post_init__(self) -> None:
        check_positive(self, "heads", "kv_heads", "head_dim", "value_dim", "value_scale", "clip", "scale", "window")
        check_positive(self, "block")
        if self.block > 1 and self.window is not None:
            raise ConfigError(f"attention to the end of blocks of {self.block} has no window, got {self.window}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} KV heads evenly")
        if self.rope is not None:
            check_rotated(self.rope, self.head_dim)


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

    Keys and values of all heads are linear in one latent vector of each position; a part of each key, the same for all
    heads, is rotated.
    """

    heads: int
    q_lora_rank: int | None
    """Width of the latent vector of queries; `None` where they are projected at once."""
    kv_lora_rank: int
    """Width of the latent vector of keys and values."""
    qk_nope_head_dim: int
    """Of the part of each query and key that is not rotated."""
    qk_rope_head_dim: int
    v_head_dim: int
    rope: RopeConfig
    scale: float
    """By which scores are multiplied."""
    bias: bool = False
    """Whether the projections to latents and to the output add biases."""
    eps: float = 1e-6
    """Of the norms of latents."""
    output_gate: OutputGate | None = None

    def __post_init__(self) -> None:
        check_positive(self, "heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        check_positive(self, "v_head_dim", "scale", "eps")
        check_rotated(self.rope, self.qk_rope_head_dim)

    @property
    def kv_heads(self) -> int:
        """All heads share what is cached."""
        return 1

    @property
    def window(self) -> None:
        """Every position sees all before it."""
        return None

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Numbers that the cache holds of each position: the rotated part of keys as a key, the latent as a value."""
        return self.qk_rope_head_dim, self.kv_lora_rank
