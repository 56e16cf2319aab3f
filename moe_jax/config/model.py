"""Configuration of a whole model and of its layers."""

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
"""Divisor of the number of embedding rows: the table is padded, so that its shape does not depend on the mesh."""


@dataclass(frozen=True)
class LayerConfig:
    """Decoder layer: a token mixer and a feed-forward block."""

    attention: AttentionConfig | LatentAttentionConfig | RecurrentConfig
    """Attention, or a recurrent layer in its place."""
    ffn: DenseConfig | MoEConfig
    """Feed-forward block."""


class Norm(Enum):
    """Norm of the rows before each block and before the head."""

    RMS = auto()
    """RMS norm."""
    RMS_AROUND_ONE = auto()
    """RMS norm that multiplies by one plus the weight, for queries and keys too."""
    LAYER = auto()
    """Layer norm without a bias."""
    LAYER_WITH_BIAS = auto()
    """Layer norm with a bias."""


@dataclass(frozen=True)
class ModelConfig:
    """Pre-norm decoder.

    Raises:
      ConfigError: a size that is not positive, or fields that contradict each other.
    """

    vocab_size: int
    """`vocab_size`: number of token ids."""
    hidden: int
    """`hidden_size`: width of a row."""
    layers: tuple[LayerConfig, ...]
    """Decoder layers, `num_hidden_layers` of them."""
    norm_eps: float
    """`rms_norm_eps`: epsilon of the norms."""
    max_positions: int
    """`max_position_embeddings`: longest sequence that the model supports, in tokens."""
    tied_embeddings: bool = False
    """`tie_word_embeddings`: True if the head is the embedding table."""
    norm: Norm = Norm.RMS
    """Norm before each block and before the head."""
    head_bias: bool = False
    """`lm_head_bias`: True if the head adds a bias to the logits."""
    norm_head: bool = False
    """`norm_head`: scale each column of the head, one entry for each token, to unit length."""
    embedding_scale: float = 1.0
    """`embedding_multiplier`: factor on the embeddings."""
    residual_scale: float = 1.0
    """`residual_multiplier`: factor on the output of each block before it is added to the residual."""
    logit_scale: float = 1.0
    """1 / `logits_scaling`: factor on the logits."""
    diffusion: BlockDiffusion | None = None
    """Block diffusion; `None` for decoding one token at a time."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "hidden", "norm_eps", "max_positions")
        check_positive(self, "embedding_scale", "residual_scale", "logit_scale")
        if self.tied_embeddings and self.head_bias:
            raise ConfigError("tied embeddings have no head bias: set tied_embeddings or head_bias to False")
        if not self.layers:
            raise ConfigError("a model needs at least one layer, got none")
        for layer in self.layers:
            self._check_block(layer.attention)

    def _check_block(self, attention: AttentionConfig | LatentAttentionConfig | RecurrentConfig) -> None:
        block = attention.block if isinstance(attention, AttentionConfig) else 1
        if self.diffusion is None:
            if block > 1:
                raise ConfigError(f"attention within blocks of {block} positions needs ModelConfig.diffusion")
            return
        if not isinstance(attention, AttentionConfig) or block != self.diffusion.block:
            raise ConfigError(
                f"AttentionConfig.block must be {self.diffusion.block}, the diffusion block, in every layer"
            )
        if self.diffusion.mask_token >= self.vocab_size:
            raise ConfigError(
                f"mask_token must be below vocab_size, {self.vocab_size}, got {self.diffusion.mask_token}"
            )

    @property
    def block(self) -> int:
        """Number of positions that are decoded together; 1 without block diffusion."""
        return 1 if self.diffusion is None else self.diffusion.block

    @property
    def recurrent(self) -> bool:
        """True if any layer is recurrent. The state of a recurrent layer holds the last position only."""
        return any(isinstance(layer.attention, RecurrentConfig) for layer in self.layers)

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table in memory: `vocab_size` rounded up to a multiple of `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
