"""Continuous batching: requests that come and go, decoded together."""

from moe_jax.engine.engine import Engine
from moe_jax.engine.generation import Generation, News
from moe_jax.engine.options import Options
from moe_jax.engine.orders import Order
from moe_jax.engine.stats import Latency, Stats

__all__ = ["Engine", "Generation", "Latency", "News", "Options", "Order", "Stats"]
