"""Validation of model configurations."""

from __future__ import annotations

from typing import Any

import pytest

from moe_jax.config import (
    AttentionConfig,
    BlockDiffusion,
    DenseConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
)
from moe_jax.errors import ConfigError

ATTENTION: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "rope": RopeConfig(1e4)}
MODEL: dict[str, Any] = {"vocab_size": 100, "hidden": 16, "norm_eps": 1e-6, "max_positions": 32}
MOE: dict[str, Any] = {"experts": 4, "top_k": 2, "width": 8, "router": RouterConfig()}

BLOCK_LAYER = LayerConfig(AttentionConfig(**ATTENTION, block=4), DenseConfig(8))
BLOCKS = MODEL | {"layers": (BLOCK_LAYER,)}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AttentionConfig, ATTENTION | {"kv_heads": 3}, "4 attention heads cannot share 3 KV heads"),
        (AttentionConfig, ATTENTION | {"head_dim": 7}, "head_dim must be even, got 7"),
        (AttentionConfig, ATTENTION | {"window": 0}, "window must be positive and finite, got 0"),
        (MoEConfig, MOE | {"top_k": 5}, "top_k 5 exceeds the number of experts, 4"),
        (MoEConfig, MOE | {"width": -8}, "width must be positive and finite, got -8"),
        (DenseConfig, {"width": 0}, "width must be positive and finite, got 0"),
        (ModelConfig, MODEL | {"layers": ()}, "at least one layer"),
        (AttentionConfig, ATTENTION | {"block": 0}, "block must be positive and finite, got 0"),
        (AttentionConfig, ATTENTION | {"block": 4, "window": 8}, "blocks of 4 has no window: got 8, use None"),
        (BlockDiffusion, {"block": 0, "mask_token": 1}, "block must be positive and finite, got 0"),
        (BlockDiffusion, {"block": 4, "mask_token": -1}, "must be a token id, 0 or more, got -1"),
        (ModelConfig, BLOCKS, "blocks of 4 positions needs ModelConfig.diffusion"),
        (
            ModelConfig,
            BLOCKS | {"diffusion": BlockDiffusion(8, 1)},
            "block must be 8, the diffusion block, in every layer",
        ),
        (
            ModelConfig,
            BLOCKS | {"diffusion": BlockDiffusion(4, 100)},
            "mask_token must be below vocab_size, 100, got 100",
        ),
    ],
)
def test_invalid_config_is_refused(kind: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


def test_vocab_rows_are_a_multiple_of_128() -> None:
    layer = LayerConfig(AttentionConfig(**ATTENTION), MoEConfig(**MOE))
    sizes = {1: 128, 128: 128, 129: 256, 151936: 151936}
    for vocab, rows in sizes.items():
        config = ModelConfig(layers=(layer,), **{**MODEL, "vocab_size": vocab})
        assert config.vocab_rows == rows
