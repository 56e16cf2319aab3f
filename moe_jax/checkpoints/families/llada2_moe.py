"""LLaDA 2 (Ant Group, arXiv:2512.15745): Ling 2.0 with block diffusion, by default in blocks of 32 positions."""

from moe_jax.checkpoints.families import bailing_moe
from moe_jax.checkpoints.families.diffusion_fields import with_block_diffusion
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import ModelConfig

SOURCES = bailing_moe.SOURCES


def read(fields: Fields) -> ModelConfig:
    fields.expect("using_split_qkv_in_self_attention", False)
    model = bailing_moe.read_model(fields, qk_norm=True, biased=True, scale=2.5)
    return with_block_diffusion(fields, model, block=32, mask=156895)
