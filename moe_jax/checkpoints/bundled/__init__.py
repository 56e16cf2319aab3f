"""Models that come with the package."""

from pathlib import Path

ADDER = Path(__file__).parent / "adder"
"""A small Qwen3-MoE that adds numbers; `moe_jax.training.recipe` made it."""
