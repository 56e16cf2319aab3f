"""Llama 4 as published on the hub: the language model of the multimodal checkpoint."""

from moe_jax.checkpoints.families import llama4_text
from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.checkpoints.weight_mapping import within
from moe_jax.config import ModelConfig

SOURCES = within("language_model.", llama4_text.SOURCES)
IGNORED_PREFIXES = ("vision_model.", "multi_modal_projector.")


def read(fields: Fields) -> ModelConfig:
    fields.ignore("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")
    fields.expect("tie_word_embeddings", False)
    return llama4_text.read(fields.inner(TEXT))
