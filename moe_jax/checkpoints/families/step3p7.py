"""Step-3.7-Flash: the language model of the multimodal checkpoint, the same as Step-3.5's."""

from moe_jax.checkpoints.families import step3p5
from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.config import ModelConfig

SOURCES = step3p5.SOURCES
IGNORED_PREFIXES = ("vision_model.", "vit_large_projector.")


def read(fields: Fields) -> ModelConfig:
    fields.ignore("vision_config", "image_token_id", "projector_bias")
    fields.expect("tie_word_embeddings", False)
    return step3p5.read(fields.inner(TEXT))
