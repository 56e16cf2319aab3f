"""What a model is, as frozen data validated on birth. Nothing here imports jax.

A checkpoint family (`moe_jax.checkpoints.families`) turns a Hugging Face `config.json` into a `ModelConfig`; every
other module reads only the small choices below and knows no family by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.errors import ConfigError

VOCAB_MULTIPLE = 128
"""Embedding tables are padded to this many rows, so that their shape does not depend on the mesh that holds them."""


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value <= 0:
            raise ConfigError(f"{type(owner).__name__}.{name} must be positive, got {value}")


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention with half-split rotary embedding."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    bias: bool = False
    """Whether the query, key and value projections add a bias."""
    qk_norm: bool = False
    """Whether each query and key head is RMS-normalised before the rotary embedding."""
    window: int | None = None
    """Sliding window: a position sees itself and the `window - 1` before it. `None` sees all before it."""

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads", "head_dim", "rope_theta")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"rotary embedding rotates pairs: head_dim must be even, got {self.head_dim}")
        if self.window is not None:
            _positive(self, "window")


@dataclass(frozen=True)
class DenseConfig:
    """A SwiGLU feed-forward of one intermediate width."""

    width: int

    def __post_init__(self) -> None:
        _positive(self, "width")


@dataclass(frozen=True)
class SharedExpertConfig:
    """An expert that every token visits."""

    width: int
    gated: bool
    """Whether a sigmoid of a projection of the token scales its output."""

    def __post_init__(self) -> None:
        _positive(self, "width")


@dataclass(frozen=True)
class MoEConfig:
    """A softmax router over SwiGLU experts: score all, keep the best `top_k`."""

    experts: int
    top_k: int
    width: int
    renormalise: bool
    """Whether the kept scores are divided by their sum."""
    shared: SharedExpertConfig | None = None

    def __post_init__(self) -> None:
        _positive(self, "experts", "top_k", "width")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k {self.top_k} exceeds the number of experts, {self.experts}")


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig
    ffn: DenseConfig | MoEConfig


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder."""

    vocab_size: int
    hidden: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    max_positions: int
    """The longest sequence the model was made for, in tokens."""
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden", "norm_eps", "max_positions")
        if not self.layers:
            raise ConfigError("a model needs at least one layer, got none")

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table as held in memory: the vocabulary rounded up to `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
