"""Reference feed-forward blocks in plain JAX on one device: every expert for every token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import MoEConfig, RouterConfig

Weights = Mapping[str, Any]


def swiglu(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ gate_up[..., 0, :]) * (x @ gate_up[..., 1, :])) @ down


@partial(jax.jit, static_argnames="config")
def moe(x: jax.Array, weights: Weights, config: MoEConfig) -> jax.Array:
    """Mixture of experts with softmax scores, and a shared expert if the config has one."""
    scores = jax.nn.softmax(x @ weights["router.weight"])
    lowest_kept = jnp.sort(scores)[:, -config.top_k, None]
    kept = jnp.where(scores >= lowest_kept, scores, 0)
    assert isinstance(config.router, RouterConfig)
    if config.router.norm == 1:
        kept /= kept.sum(axis=-1, keepdims=True)
    every_expert = swiglu(x, weights["experts.gate_up"], weights["experts.down"])
    out = jnp.einsum("ne,end->nd", kept, every_expert)
    if config.shared is not None:
        shared = swiglu(x, weights["shared.swiglu.gate_up"], weights["shared.swiglu.down"])
        out += shared * jax.nn.sigmoid(x @ weights["shared.gate"])[:, None]
    return out


@jax.jit
def dense(x: jax.Array, weights: Weights) -> jax.Array:
    return swiglu(x, weights["swiglu.gate_up"], weights["swiglu.down"])
