"""Model families: for each, how its `config.json` reads and what its tensors are called. Data, no computation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_jax.checkpoints.families import mixtral, qwen2_moe, qwen3_moe
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.names import Source
from moe_jax.config import ModelConfig


@dataclass(frozen=True)
class Family:
    read: Callable[[Fields], ModelConfig]
    sources: Mapping[str, Source]
    """By parameter: those of a block as named inside it, the others by their full name."""


FAMILIES: Mapping[str, Family] = {
    "mixtral": Family(mixtral.read, mixtral.SOURCES),
    "qwen2_moe": Family(qwen2_moe.read, qwen2_moe.SOURCES),
    "qwen3_moe": Family(qwen3_moe.read, qwen3_moe.SOURCES),
}
"""By the `model_type` of `config.json`."""
