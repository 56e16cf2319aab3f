"""Step-3.7-Flash, with a model of pictures beside that of text, which is Step-3.5's: the latter only."""

from moe_jax.checkpoints.families import step3p5
from moe_jax.checkpoints.fields import TEXT, Fields
from moe_jax.config import ModelConfig

SOURCES = step3p5.SOURCES
UNUSED = ("vision_model.", "vit_large_projector.")


def read(fields: Fields) -> ModelConfig:
    for name in ("vision_config", "image_token_id", "projector_bias"):
        fields.any(name, None)
    fields.expect("tie_word_embeddings", False)
    return step3p5.read(fields.inner(TEXT))
