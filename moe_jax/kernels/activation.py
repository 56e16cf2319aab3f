"""Gated activations of feed-forward layers.

M  rows     F  width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import Activation, ClampedSwiGLUConfig, LimitedSwiGLUConfig, SwiGLUConfig


def gated_activation(activation: Activation, gate: Float[Array, "M F"], up: Float[Array, "M F"]) -> Float[Array, "M F"]:
    """Activate the gate projection and multiply the up projection by it."""
    match activation:
        case SwiGLUConfig():
            return jax.nn.silu(gate) * up
        case LimitedSwiGLUConfig(limit):
            return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)
        case ClampedSwiGLUConfig(limit, slope):
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            return gate * jax.nn.sigmoid(slope * gate) * (up + 1)
