"""Continuous batching: requests that come and go, decoded together."""

from moe_jax.engine.engine import Engine
from moe_jax.engine.generation import Generation, OutputQueue
from moe_jax.engine.options import Options
from moe_jax.engine.stats import Latency, Stats

__all__ = ["Engine", "Generation", "Latency", "Options", "OutputQueue", "Stats"]
