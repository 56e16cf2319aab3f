"""Attention configurations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.numbers import check_positive
from moe_jax.config.rope import RopeConfig, check_rotated
from moe_jax.errors import ConfigError


class QKNorm(Enum):
    """Kind of RMS norm on queries and keys (`use_qk_norm`)."""

    HEAD = auto()
    """Norm over each head, before the rotary embedding."""
    ROTATED_HEAD = auto()
    """Norm over each head, after the rotary embedding."""
    ROTATED_UNIT = auto()
    """Norm over each head, after the rotary embedding, without a weight."""
    PROJECTION = auto()
    """Norm over all heads together, before the rotary embedding."""


class OutputGate(Enum):
    """Granularity of the output gate: a sigmoid of a projection of the row multiplies attention's output."""

    HEAD = auto()
    """One gate for each head (`use_head_wise_attn_gate`)."""
    CHANNEL = auto()
    """One gate for each channel of each head (`attn_output_gate`)."""


class Window(Enum):
    """Kind of attention window."""

    SLIDING = auto()
    """Sliding window: a position attends to the last `window` positions, itself included."""
    CHUNKED = auto()
    """Chunked attention: a position attends to its own chunk; chunks of `window` positions start at position 0."""


@dataclass(frozen=True)
class QueryScalingConfig:
    """Query scaling by position: `1 + strength * ln(1 + floor((p + 1) / interval))` multiplies the query at position p.

    The factor keeps the softmax over many positions from flattening (Nakanishi, arXiv:2501.19399).
    """

    interval: int
    """`floor_scale`: number of positions that share one factor."""
    strength: float
    """`attn_scale`: coefficient of the logarithm."""

    def __post_init__(self) -> None:
        check_positive(self, "interval", "strength")


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245).

    Raises:
      ConfigError: a size that is not positive, or sizes that do not fit each other.
    """

    heads: int
    """`num_attention_heads`: number of query heads."""
    kv_heads: int
    """`num_key_value_heads`: number of key-value heads; it divides `heads`."""
    head_dim: int
    """`head_dim`: width of each query and key head."""
    rope: RopeConfig | None
    """`rope_parameters`: rotary embedding; `None` for attention without position embedding."""
    value_dim: int | None = None
    """`v_head_dim`: width of each value head; `None` means `head_dim`."""
    value_scale: float = 1.0
    """`attention_value_scale`: factor on the values."""
    bias: bool = False
    """`attention_bias`: True if the query, key and value projections add a bias."""
    output_bias: bool = False
    """`attention_bias` of the output projection: True if it adds a bias."""
    qk_norm: QKNorm | None = None
    """`use_qk_norm`: RMS norm on queries and keys; `None` for no norm."""
    clip: float | None = None
    """`clip_qkv`: bound on the absolute value of projected queries, keys and values; `None` for no bound."""
    scale: float | None = None
    """`attention_multiplier`: factor on the attention scores; `None` means `head_dim ** -0.5`."""
    sinks: bool = False
    """Attention sinks: True if each head has a learned extra logit in its softmax (Xiao et al., arXiv:2309.17453)."""
    query_scaling: QueryScalingConfig | None = None
    """`attn_temperature_tuning`: query scaling by position; `None` for no scaling."""
    window: int | None = None
    """`sliding_window` or `attention_chunk_size`: window size in positions; `None` for full attention."""
    window_kind: Window = Window.SLIDING
    """Kind of the window; it has no effect without one."""
    block: int = 1
    """`block_size`: attention is bidirectional within blocks of this many positions; 1 for causal attention."""
    output_gate: OutputGate | None = None
    """Granularity of the output gate; `None` for no gate."""

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Key width and value width that the cache holds for each KV head and position."""
        return self.head_dim, self.value_dim or self.head_dim

    def __post_init__(self) -> None:
        check_positive(self, "heads", "kv_heads", "head_dim", "value_dim", "value_scale", "clip", "scale", "window")
        check_positive(self, "block")
        if self.block > 1 and self.window is not None:
            raise ConfigError(f"attention within blocks of {self.block} has no window: got {self.window}, use None")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} KV heads evenly")
        if self.rope is not None:
            check_rotated(self.rope, self.head_dim)


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention, MLA (DeepSeek-V2, arXiv:2405.04434).

    Keys and values of all heads are projections of one latent vector for each position. All heads share the rotated
    part of the key.

    Raises:
      ConfigError: a size that is not positive, or a rotary embedding that does not fit `qk_rope_head_dim`.
    """

    heads: int
    """`num_attention_heads`: number of query heads."""
    q_lora_rank: int | None
    """`q_lora_rank`: width of the query latent; `None` for queries projected directly."""
    kv_lora_rank: int
    """`kv_lora_rank`: width of the key-value latent."""
    qk_nope_head_dim: int
    """`qk_nope_head_dim`: width of the part of each query and key head without rotary embedding."""
    qk_rope_head_dim: int
    """`qk_rope_head_dim`: width of the part of each query and key head with rotary embedding."""
    v_head_dim: int
    """`v_head_dim`: width of each value head."""
    rope: RopeConfig
    """`rope_parameters`: rotary embedding."""
    scale: float
    """Factor on the attention scores."""
    bias: bool = False
    """`attention_bias`: True if the projections to the latents and to the output add a bias."""
    eps: float = 1e-6
    """Epsilon of the RMS norms of the latents."""
    output_gate: OutputGate | None = None
    """Granularity of the output gate; `None` for no gate."""

    def __post_init__(self) -> None:
        check_positive(self, "heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        check_positive(self, "v_head_dim", "scale", "eps")
        check_rotated(self.rope, self.qk_rope_head_dim)

    @property
    def kv_heads(self) -> int:
        """Number of cached heads: all query heads share one latent."""
        return 1

    @property
    def window(self) -> None:
        """Full attention: MLA has no window."""
        return None

    @property
    def cached_widths(self) -> tuple[int, int]:
        """Widths that the cache holds for each position: the rotated key part as key, the latent as value."""
        return self.qk_rope_head_dim, self.kv_lora_rank
