"""The command line `moe-jax`: one module for each command."""

from moe_jax.cli.app import main

__all__ = ["main"]
