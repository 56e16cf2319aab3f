"""Model families: for each, how its `config.json` reads and what its tensors are called. Data, no computation."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from moe_jax.checkpoints.families import (
    bailing_hybrid,
    bailing_moe,
    bailing_moe_linear,
    bailing_moe_v2,
    dbrx,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    exaone_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    hy_v3,
    jamba,
    llada2_moe,
    llama4,
    llama4_text,
    mimo_v2_flash,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_5_moe_text,
    qwen3_moe,
    qwen3_next,
    sarvam_mla,
    sarvam_moe,
    sdar_moe,
    step3p5,
    step3p7,
)
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import Source
from moe_jax.config import ModelConfig


@dataclass(frozen=True)
class Family:
    read: Callable[[Fields], ModelConfig]
    sources: Mapping[str, Source]
    """By parameter: those of a block as named inside it, the others by their full name."""
    unused: tuple[str, ...]
    """How the names of tensors begin that may be there without being read."""
    elsewhere: Mapping[str, Source]
    """Of parameters that some files hold in other tensors than `sources` says: those tensors."""

    def sources_in(self, tensors: Collection[str]) -> Mapping[str, Source]:
        """Where parameters are in a file of these tensors."""
        names = [
            name.format(layer="(\\d+)", expert="(\\d+)") for each in self.elsewhere.values() for name in each.names
        ]
        found = any(re.fullmatch(name, tensor) for name in names for tensor in tensors)
        return {**self.sources, **self.elsewhere} if found else self.sources


_MODULES = (
    bailing_hybrid,
    bailing_moe,
    bailing_moe_linear,
    bailing_moe_v2,
    dbrx,
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    exaone_moe,
    glm4_moe,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    hy_v3,
    jamba,
    llada2_moe,
    llama4,
    llama4_text,
    mimo_v2_flash,
    minimax_m2,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_5_moe_text,
    qwen3_moe,
    qwen3_next,
    sarvam_mla,
    sarvam_moe,
    sdar_moe,
    step3p5,
    step3p7,
)
FAMILIES: Mapping[str, Family] = {
    module.__name__.rpartition(".")[2]: Family(
        module.read, module.SOURCES, getattr(module, "UNUSED", ()), getattr(module, "ELSEWHERE", {})
    )
    for module in _MODULES
}
"""By the `model_type` of `config.json`, which each page of data is named after."""
