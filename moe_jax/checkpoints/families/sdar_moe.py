"""SDAR (arXiv:2510.06303): Qwen3-MoE that sees, and decodes, blocks, of 4 positions where the file does not say."""

from moe_jax.checkpoints.families import qwen3_moe
from moe_jax.checkpoints.families.diffusion_fields import in_blocks
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import ModelConfig

SOURCES = qwen3_moe.SOURCES
NOTHING = ("attn_implementation", "debug", "fuse_cross_entropy", "micro_forward", "skip_checkpoint")
"""Of training."""


def read(fields: Fields) -> ModelConfig:
    for name in NOTHING:
        fields.any(name, None)
    return in_blocks(fields, qwen3_moe.read(fields), block=4, mask=151669)
