"""Everything that touches a disk: Hugging Face directories in and out, orbax, and one page of data per model family."""

from moe_jax.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
