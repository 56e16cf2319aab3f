"""Config fields of models that decode by block diffusion."""

from __future__ import annotations

from dataclasses import replace

from moe_jax.checkpoints.fields import Fields
from moe_jax.config import AttentionConfig, BlockDiffusion, LayerConfig, ModelConfig


def with_block_diffusion(fields: Fields, model: ModelConfig, *, block: int, mask: int) -> ModelConfig:
    """Make a model attend to, and decode, whole blocks of positions.

    Args:
      block: default of `block_size`, in positions.
      mask: default of `mask_token_id`.
    """
    diffusion = BlockDiffusion(fields.take("block_size", int, block), fields.take("mask_token_id", int, mask))
    layers = tuple(_with_block(layer, diffusion.block) for layer in model.layers)
    return replace(model, layers=layers, diffusion=diffusion)


def _with_block(layer: LayerConfig, block: int) -> LayerConfig:
    assert isinstance(layer.attention, AttentionConfig)
    return replace(layer, attention=replace(layer.attention, block=block))
