"""Model families: for each `model_type`, a reader of `config.json` and a table of tensor names. Data only."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import Source
from moe_jax.config import ModelConfig

MODEL_TYPES = (
    "bailing_hybrid",
    "bailing_moe",
    "bailing_moe_linear",
    "bailing_moe_v2",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "hy_v3",
    "jamba",
    "llada2_moe",
    "llama4",
    "llama4_text",
    "mimo_v2_flash",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "sarvam_mla",
    "sarvam_moe",
    "sdar_moe",
    "step3p5",
    "step3p7",
)
"""Values of `model_type` in `config.json`. The family of each is the module of that name."""
ALIASES: Mapping[str, str] = {"hunyuan": "hunyuan_v1_moe", "kimi_k2": "deepseek_v3"}
"""Other values of `model_type`, with the one that means the same."""


@dataclass(frozen=True)
class Family:
    """One family: how its config is read and how its tensors become parameters."""

    read: Callable[[Fields], ModelConfig]
    """Reader of the fields of `config.json`."""
    sources: Mapping[str, Source]
    """Source of each parameter. A parameter of a decoder layer has its name within the layer, others their full
    name."""
    ignored_prefixes: tuple[str, ...]
    """Name prefixes of tensors that a file may hold and the model does not read."""
    alternative_sources: Mapping[str, Source]
    """Sources that replace those of `sources` in files that hold tensors of these names."""

    def sources_in(self, tensors: Collection[str]) -> Mapping[str, Source]:
        """Return the source of each parameter in a checkpoint with tensors of the given names."""
        patterns = [
            name.format(layer="(\\d+)", expert="(\\d+)")
            for source in self.alternative_sources.values()
            for name in source.names
        ]
        found = any(re.fullmatch(pattern, tensor) for pattern in patterns for tensor in tensors)
        return {**self.sources, **self.alternative_sources} if found else self.sources


def _family(model_type: str) -> Family:
    module = import_module(f"{__name__}.{model_type}")
    return Family(
        module.read,
        module.SOURCES,
        getattr(module, "IGNORED_PREFIXES", ()),
        getattr(module, "ALTERNATIVE_SOURCES", {}),
    )


FAMILIES: Mapping[str, Family] = {model_type: _family(model_type) for model_type in MODEL_TYPES}
"""Families by the `model_type` of `config.json`."""
