"""Models that ship with the package."""

from pathlib import Path

ADDER = Path(__file__).parent / "adder"
"""Directory of a small Qwen3-MoE that adds numbers. `moe_jax.training.recipe` trains it."""
