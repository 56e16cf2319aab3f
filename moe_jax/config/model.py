"""Layers, and the model around them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from moe_jax.config.attention import AttentionConfig, LatentAttentionConfig
from moe_jax.config.decoding import BlockDiffusion
from moe_jax.config.feed_forward import DenseConfig, MoEConfig
from moe_jax.config.numbers import check_positive
from moe_jax.config.recurrent import RecurrentConfig
from moe_jax.errors import ConfigError

VOCAB_MULTIPLE = 128
"""Embedding tables are padded to this many rows, so that their shape does not depend on the mesh that holds them."""


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig | LatentAttentionConfig | RecurrentConfig
    ffn: DenseConfig | MoEConfig


class Norm(Enum):
    """What normalises rows before blocks and before the head."""

    RMS = auto()
    RMS_AROUND_ONE = auto()
    """Scaled by one more than the weight; so are normalised queries and keys."""
    LAYER = auto()
    """Layer norm without a bias."""
    LAYER_WITH_BIAS = auto()


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
    norm: Norm = Norm.RMS
    head_bias: bool = False
    """Whether the logits have a bias."""
    norm_head: bool = False
    """Whether each of the head's columns, which has a number of every token, is scaled to unit length."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """By which the output of each block is multiplied before it is added."""
    logit_scale: float = 1.0
    diffusion: BlockDiffusion | None = None
    """How tokens are chosen; `None` for one after the other."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "hidden", "norm_eps", "max_positions")
        check_positive(self, "embedding_scale", "residual_scale", "logit_scale")
        if self.tied_embeddings and self.head_bias:
            raise ConfigError("a head that is the embedding has no bias")
        if not self.layers:
            raise ConfigError("a model needs at least one layer, got none")
        for layer in self.layers:
            self._check_seen(layer.attention)

    def _check_seen(self, attention: AttentionConfig | LatentAttentionConfig | RecurrentConfig) -> None:
        seen = attention.block if isinstance(attention, AttentionConfig) else 1
        if self.diffusion is None and seen > 1:
            raise ConfigError(f"who sees blocks of {seen} positions cannot choose one token after the other")
        if self.diffusion is not None and not (isinstance(attention, AttentionConfig) and seen == self.diffusion.block):
            raise ConfigError(f"every layer must see the blocks of {self.diffusion.block} positions that are decoded")
        if self.diffusion is not None and self.diffusion.mask_token >= self.vocab_size:
            raise ConfigError(f"the mask, {self.diffusion.mask_token}, is none of {self.vocab_size} tokens")

    @property
    def block(self) -> int:
        """Positions that are decoded together."""
        return 1 if self.diffusion is None else self.diffusion.block

    @property
    def recurrent(self) -> bool:
        """Whether some layer keeps a state, which says nothing of any position but the last."""
        return any(isinstance(layer.attention, RecurrentConfig) for layer in self.layers)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table as held in memory: the vocabulary rounded up to `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
