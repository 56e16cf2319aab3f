"""Qwen3.5-MoE as the hub has it, beside a vision model that is left out: the experts of a layer in one tensor."""

from dataclasses import replace

from moe_jax.checkpoints.families import qwen3_5_moe_text
from moe_jax.checkpoints.families.shared_names import MLP
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import Source, arranged
from moe_jax.config import ModelConfig

EXPERTS = {
    "ffn.experts.gate_up": arranged(MLP + "experts.gate_up_proj", here="e d p f", file="e (p f) d"),
    "ffn.experts.down": arranged(MLP + "experts.down_proj", here="e f d", file="e d f"),
}


def _beside_vision(source: Source) -> Source:
    names = (name.replace("model.", "model.language_model.", 1) for name in source.names)
    return replace(source, names=tuple(names))


APART = {name: _beside_vision(source) for name, source in qwen3_5_moe_text.SOURCES.items()}
SOURCES = APART | {name: _beside_vision(source) for name, source in EXPERTS.items()}
ELSEWHERE = {name: APART[name] for name in EXPERTS}
"""As transformers writes them: each expert has tensors of its own."""
UNUSED = ("mtp.", "model.visual.")


def read(fields: Fields) -> ModelConfig:
    for name in ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        fields.any(name, None)
    tied = fields.take("tie_word_embeddings", bool, False)
    return qwen3_5_moe_text.read(fields.inner("text_config"), tied=tied)
