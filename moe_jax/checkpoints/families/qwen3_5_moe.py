"""Qwen3.5-MoE as published on the hub: the language model of the multimodal checkpoint, fused experts."""

from dataclasses import replace

from moe_jax.checkpoints.families import qwen3_5_moe_text
from moe_jax.checkpoints.families.shared_names import MLP
from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.checkpoints.weight_mapping import Source, arranged
from moe_jax.config import ModelConfig

EXPERTS = {
    "ffn.experts.gate_up": arranged(MLP + "experts.gate_up_proj", parameter="e d p f", tensor="e (p f) d"),
    "ffn.experts.down": arranged(MLP + "experts.down_proj", parameter="e f d", tensor="e d f"),
}


def _language_model(source: Source) -> Source:
    names = (name.replace("model.", "model.language_model.", 1) for name in source.names)
    return replace(source, names=tuple(names))


PER_EXPERT_SOURCES = {name: _language_model(source) for name, source in qwen3_5_moe_text.SOURCES.items()}
SOURCES = PER_EXPERT_SOURCES | {name: _language_model(source) for name, source in EXPERTS.items()}
ALTERNATIVE_SOURCES = {name: PER_EXPERT_SOURCES[name] for name in EXPERTS}
"""Separate tensors for each expert, as transformers writes them."""
IGNORED_PREFIXES = ("mtp.", "model.visual.")


def read(fields: Fields) -> ModelConfig:
    fields.ignore("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tied = fields.take("tie_word_embeddings", bool, False)
    return qwen3_5_moe_text.read(fields.inner(TEXT), tied=tied)
