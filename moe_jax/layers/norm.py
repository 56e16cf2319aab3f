"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.layers import parameter


class RMSNorm(nnx.Module):
    """Scales the last dimension to unit mean square, then by a weight. Sums in float32."""

    def __init__(self, width: int, eps: float, *, dtype: DTypeLike) -> None:
        self.eps = eps
        self.weight = parameter.ones((width,), (None,), dtype=dtype)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.float32)
        scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight[...]
