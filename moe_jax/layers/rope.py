"""Rotary position embedding (Su et al., arXiv:2104.09864), the form that rotates the two halves of a head."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


def rotate(x: Float[Array, "T H d"], positions: Int32[Array, "T"], theta: float) -> Float[Array, "T H d"]:
    """Rotate each head's pairs (i, i + d/2) by position times `theta ** (-2i/d)`, in float32."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
