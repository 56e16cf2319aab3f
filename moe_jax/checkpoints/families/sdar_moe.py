"""SDAR (arXiv:2510.06303): Qwen3-MoE with block diffusion, by default in blocks of 4 positions."""

from moe_jax.checkpoints.families import qwen3_moe
from moe_jax.checkpoints.families.diffusion_fields import with_block_diffusion
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import ModelConfig

SOURCES = qwen3_moe.SOURCES


def read(fields: Fields) -> ModelConfig:
    fields.ignore("attn_implementation", "debug", "fuse_cross_entropy", "micro_forward", "skip_checkpoint")
    return with_block_diffusion(fields, qwen3_moe.read(fields), block=4, mask=151669)
