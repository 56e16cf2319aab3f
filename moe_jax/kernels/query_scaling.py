"""Queries that grow with their position (Nakanishi, arXiv:2501.19399).

T  rows
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from moe_jax.config import QueryScalingConfig


def query_scale(config: QueryScalingConfig, positions: Int32[Array, "T"]) -> Float[Array, "T 1 1"]:
    """Factor of each row's query, the same for all heads: `1 + strength * log(1 + (position + 1) // interval)`."""
    intervals = (positions + 1) // config.interval
    return 1 + config.strength * jnp.log1p(intervals.astype(jnp.float32))[:, None, None]
