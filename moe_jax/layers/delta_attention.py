"""Attention by the gated delta rule (Yang et al., arXiv:2412.06464), on the heads that this device holds.

T  rows     D  hidden     H  heads of this device     K  width of keys     V  width of values
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import DecayConfig, DeltaConfig, HeadGate
from moe_jax.kernels.recurrences import DeltaInputs, delta_rule
from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.norm import HeadNorm
from moe_jax.layers.parameter import shared_head
from moe_jax.layers.projection import HeadProjection, project_output
from moe_jax.layers.short_convolution import ShortConvolution
from moe_jax.sharding import PartialSum, Role

S = TypeVar("S", bound=States)
GATES = {HeadGate.SILU: jax.nn.silu, HeadGate.SIGMOID: jax.nn.sigmoid}
TINY = 1e-6
"""Added to the squared norm of a query or key before dividing."""


class Decay(nnx.Module):
    """Logarithm of the decay of each head's state, or of each row of it."""

    def __init__(
        self, config: DecayConfig, hidden: int, heads: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.floor = config.floor
        each = width if config.each_channel else 1
        self.projection = HeadProjection(
            hidden, heads, each, Role.HEADS, bias=False, exact=True, dtype=dtype, rngs=rngs
        )
        self.log_rate = parameter.zeros((heads,), (Role.HEADS,), dtype=jnp.float32)
        self.bias = parameter.zeros((heads, each), (Role.HEADS, None), dtype=jnp.float32)

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T H _"]:
        rate, step = jnp.exp(self.log_rate[...])[:, None], self.projection(x) + self.bias[...]
        if self.floor is None:
            return -rate * jax.nn.softplus(step)
        return self.floor * jax.nn.sigmoid(rate * step)


class DeltaAttention(nnx.Module):
    """Gated delta rule over short convolutions of queries, keys and values, then a gated norm of each head."""

    rotary: None = None
    """No rotary embedding: the state orders positions."""

    def __init__(self, config: DeltaConfig, hidden: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        heads, key_heads, keys, values = config.heads, config.key_heads, config.key_head_dim, config.value_head_dim
        like = {"dtype": dtype, "rngs": rngs}
        self.query = HeadProjection(hidden, key_heads, keys, Role.KV_HEADS, bias=False, **like)
        self.key = HeadProjection(hidden, key_heads, keys, Role.KV_HEADS, bias=False, **like)
        self.value = HeadProjection(hidden, heads, values, Role.HEADS, bias=False, **like)
        self.query_convolution = ShortConvolution((key_heads, keys), config.conv_kernel, Role.KV_HEADS, **like)
        self.key_convolution = ShortConvolution((key_heads, keys), config.conv_kernel, Role.KV_HEADS, **like)
        self.value_convolution = ShortConvolution((heads, values), config.conv_kernel, Role.HEADS, **like)
        self.decay = Decay(config.decay, hidden, heads, keys, **like)
        self.strength = HeadProjection(hidden, heads, 1, Role.HEADS, bias=False, exact=True, **like)
        self.gate = HeadProjection(hidden, heads, values, Role.HEADS, bias=False, **like)
        self.norm = HeadNorm(values, eps, dtype=dtype)
        self.output = parameter.matrix(
            rngs, (heads, values, hidden), (Role.HEADS, None, None), inputs=(0, 1), dtype=dtype
        )

    def __call__(self, x: Float[Array, "T D"], step: Step, states: S, layer: Int32[Array, ""]) -> tuple[PartialSum, S]:
        """Return this device's heads' part of the output, and the states after the rows."""
        head = shared_head(self.config.key_heads, step.residual.placement)
        query, states = self.query_convolution(self.query(x, head), states, layer, 0, step, head)
        key, states = self.key_convolution(self.key(x, head), states, layer, 1, step, head)
        value, states = self.value_convolution(self.value(x), states, layer, 2, step)
        heads_per_key = value.shape[1] // key.shape[1]
        query, key = (jnp.repeat(_unit(part), heads_per_key, axis=1) for part in (query, key))
        rows = DeltaInputs(
            query * self.config.key_head_dim**-0.5,
            key,
            value,
            self.decay(x),
            jax.nn.sigmoid(self.strength(x)[..., 0]),
        )
        with jax.named_scope("advance"):
            shape = (*value.shape[1:2], self.config.key_head_dim, self.config.value_head_dim)
            out, states = states.advance(layer, rows, shape, step, delta_rule)
        out = self.norm(out) * GATES[self.config.gate](self.gate(x).astype(jnp.float32))
        return project_output(out.astype(x.dtype), self.output, None, step.residual), states


def _unit(x: Float[Array, "T H K"]) -> Float[Array, "T H K"]:
    """Scale to an L2 norm of 1, in float32."""
    wide = x.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + TINY)
