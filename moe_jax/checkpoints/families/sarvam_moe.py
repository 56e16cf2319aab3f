"""Sarvam-30B (Sarvam AI, 2026): Ling 2.0 without expert groups, whole heads rotated."""

from moe_jax.checkpoints.families import bailing_moe
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import ModelConfig

SOURCES = bailing_moe.SOURCES


def read(fields: Fields) -> ModelConfig:
    fields.ignore("attn_implementation")
    return bailing_moe.read_model(fields, qk_norm=True, biased=True, dense=1, scale=2.5, theta=1e4)
