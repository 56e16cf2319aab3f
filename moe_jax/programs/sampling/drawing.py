"""Random draws from a distribution over vocabulary shards, by the inverse of its cumulative distribution function."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from moe_jax.programs.sampling.vocab_shard import VocabShard
from moe_jax.sharding import Role

BLOCK_SIZE = 128
"""Columns whose weights are summed before a draw looks at single columns."""


def draw(
    weights: Float[Array, "Q V"], shard: VocabShard, seed: UInt32[Array, "Q"], generated: Int32[Array, "Q"]
) -> Int32[Array, "Q"]:
    """Draw a token of each request with probabilities proportional to the weights.

    One uniform number per request, a function of its seed and number of generated tokens, selects a device, then a
    block of columns on it, then a column. Every device computes the token as if it were selected; the selected one's is
    used.
    """
    blocks = jnp.pad(weights, ((0, 0), (0, -shard.size % BLOCK_SIZE))).reshape(weights.shape[0], -1, BLOCK_SIZE)
    block_masses = blocks.sum(axis=-1)
    device_masses = shard.all_gather(block_masses.sum(axis=-1)).T
    target = jax.vmap(_uniform)(seed, generated) * device_masses.sum(axis=-1)
    device, rest = inverse_cdf(device_masses, target)
    block, rest = inverse_cdf(block_masses, rest)
    column, _ = inverse_cdf(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    token = shard.first + block * BLOCK_SIZE + column
    return shard.all_reduce(jnp.where(device == shard.placement.index(Role.HEADS), token, 0))


def _uniform(seed: UInt32[Array, ""], generated: Int32[Array, ""]) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), generated))


def inverse_cdf(masses: Float[Array, "Q n"], target: Float[Array, "Q"]) -> tuple[Int32[Array, "Q"], Float[Array, "Q"]]:
    """Find the mass in which each target falls when the masses are laid end to end.

    Returns:
      The index of the mass, and the distance of the target from its start. However the sums are rounded, the mass is
      not 0, unless all are.
    """
    ends = jnp.cumsum(masses, axis=-1)
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    reached = (starts <= target[:, None]) & (masses > 0)
    index = jnp.where(reached, jnp.arange(masses.shape[1], dtype=jnp.int32), 0).max(axis=-1)
    start = jnp.take_along_axis(starts, index[:, None], axis=-1)[:, 0]
    return index, jnp.maximum(target - start, 0)
