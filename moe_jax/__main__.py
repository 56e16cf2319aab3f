"""Entry point of `python -m moe_jax`."""

from moe_jax.cli import main

main()
