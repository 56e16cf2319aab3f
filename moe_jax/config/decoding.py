"""Decoding other than one token at a time."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class BlockDiffusion:
    """Block diffusion: decode block after block, each by denoising (Arriola et al., arXiv:2503.09573).

    The tokens of a block start masked. Each denoising step attends to the whole block and accepts the most likely
    tokens (LLaDA, arXiv:2502.09992).

    Raises:
      ConfigError: `block` is not positive, or `mask_token` is negative.
    """

    block: int
    """`block_size`: positions in a block; blocks start at position 0."""
    mask_token: int
    """`mask_token_id`: id of the mask token; it is never generated."""

    def __post_init__(self) -> None:
        check_positive(self, "block")
        if self.mask_token < 0:
            raise ConfigError(f"BlockDiffusion.mask_token must be a token id, 0 or more, got {self.mask_token}")
