"""Checkpoints on disk: load and save Hugging Face and orbax directories, with one module of data for each family."""

from moe_jax.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
