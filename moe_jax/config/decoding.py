"""How a model chooses tokens, where it is not one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class BlockDiffusion:
    """Block after block (Arriola et al., arXiv:2503.09573): the tokens of a block begin masked and are chosen over
    several steps, in each of which the whole block sees itself, the likeliest first (LLaDA, arXiv:2502.09992)."""

    block: int
    """Positions of a block; blocks follow each other from position 0 on."""
    mask_token: int
    """What stands where no token is chosen yet; itself it is never chosen."""

    def __post_init__(self) -> None:
        check_positive(self, "block")
        if self.mask_token < 0:
            raise ConfigError(f"BlockDiffusion.mask_token is a token id, got {self.mask_token}")
