"""Fields of models that decode by block diffusion."""

from __future__ import annotations

from dataclasses import replace

from moe_jax.checkpoints.fields import Fields
from moe_jax.config import AttentionConfig, BlockDiffusion, LayerConfig, ModelConfig


def in_blocks(fields: Fields, model: ModelConfig, *, block: int, mask: int) -> ModelConfig:
    """A model that sees, and decodes, whole blocks.

    Args:
      block, mask: what the file may leave out.
    """
    diffusion = BlockDiffusion(fields.take("block_size", int, block), fields.take("mask_token_id", int, mask))
    return replace(model, layers=tuple(_seeing(layer, diffusion.block) for layer in model.layers), diffusion=diffusion)


def _seeing(layer: LayerConfig, block: int) -> LayerConfig:
    assert isinstance(layer.attention, AttentionConfig)
    return replace(layer, attention=replace(layer.attention, block=block))
