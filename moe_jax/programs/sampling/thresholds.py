"""Truncation of the distribution by top-k, top-p and min-p, without sorting.

Top-k and top-p keep the tokens whose logits reach a threshold. Bisection over the bits of a float32 finds it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from moe_jax.programs.sampling.metadata import INT32_MAX, SamplingMetadata
from moe_jax.programs.sampling.vocab_shard import VocabShard
from moe_jax.sharding.collectives import vary_alike

BITS_PER_PASS = 2
"""Bits of a threshold that one pass over the logits finds."""


def truncated_weights(
    logits: Float[Array, "Q V"], best: Float[Array, "Q"], shard: VocabShard, sampling: SamplingMetadata
) -> Float[Array, "Q V"]:
    """Probabilities after the temperature, relative to the most likely token; 0 for tokens that are cut off.

    `best` is the highest logit of each request. Tokens equal to the last one that is kept are kept.
    """
    temperature = jnp.clip(sampling.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    weights = jnp.exp((logits - best[:, None]) / temperature)
    cutoff = vary_alike(jnp.full(best.shape, -jnp.inf), best, sampling.top_k)[0]
    cutoff = lax.cond((sampling.top_k > 0).any(), lambda: _top_k_cutoff(logits, shard, sampling.top_k), lambda: cutoff)
    cutoff = lax.cond(
        (sampling.top_p < 1).any(),
        lambda: jnp.maximum(cutoff, _top_p_cutoff(logits, weights, cutoff, shard, sampling.top_p)),
        lambda: cutoff,
    )
    kept = (logits >= jnp.minimum(cutoff, best)[:, None]) & (weights >= sampling.min_p[:, None])
    return jnp.where(kept, weights, 0)


def _top_k_cutoff(logits: Float[Array, "Q V"], shard: VocabShard, top_k: Int32[Array, "Q"]) -> Float[Array, "Q"]:
    """The k-th highest logit."""
    count = jnp.where(top_k > 0, top_k, INT32_MAX)[:, None]

    def enough(thresholds: Float[Array, "Q m"]) -> Bool[Array, "Q m"]:
        above = logits[:, None] >= thresholds[..., None]
        return shard.all_reduce(above.sum(axis=-1, dtype=jnp.int32)) >= count

    return _highest_threshold(enough, top_k)


def _top_p_cutoff(
    logits: Float[Array, "Q V"],
    weights: Float[Array, "Q V"],
    cutoff: Float[Array, "Q"],
    shard: VocabShard,
    top_p: Float[Array, "Q"],
) -> Float[Array, "Q"]:
    """The lowest logit of the most likely tokens whose weights sum to `top_p` of the weights from `cutoff` on."""
    weights = jnp.where(logits >= cutoff[:, None], weights, 0)
    mass = jnp.where(top_p < 1, top_p * shard.all_reduce(weights.sum(axis=-1)), jnp.inf)[:, None]

    def enough(thresholds: Float[Array, "Q m"]) -> Bool[Array, "Q m"]:
        above = jnp.where(logits[:, None] >= thresholds[..., None], weights[:, None], 0)
        return shard.all_reduce(above.sum(axis=-1)) >= mass

    return _highest_threshold(enough, top_p)


def _highest_threshold(
    enough: Callable[[Float[Array, "Q m"]], Bool[Array, "Q m"]], like: Shaped[Array, "Q"]
) -> Float[Array, "Q"]:
    """The highest threshold of each request that is `enough`; minus infinity if none is.

    Bisection from the first bit of the threshold's `_float_of_rank` to the last, `BITS_PER_PASS` bits in each pass.
    """
    digits = jnp.arange(1, 2**BITS_PER_PASS, dtype=jnp.uint32)

    def refine(step: Array, rank: UInt32[Array, "Q"]) -> UInt32[Array, "Q"]:
        shift = (32 - BITS_PER_PASS * (step + 1)).astype(jnp.uint32)
        digit = enough(_float_of_rank(rank[:, None] + (digits << shift))).sum(axis=-1, dtype=jnp.uint32)
        return rank + (digit << shift)

    return _float_of_rank(lax.fori_loop(0, 32 // BITS_PER_PASS, refine, jnp.zeros_like(like, jnp.uint32)))


def _float_of_rank(rank: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The float32 at a rank in ascending order; ranks beyond an infinity give that infinity."""
    lowest, highest, sign = jnp.array([0x007FFFFF, 0xFF800000, 0x80000000], jnp.uint32)
    rank = jnp.clip(rank, lowest, highest)
    bits = jnp.where(rank >= sign, rank - sign, ~rank)
    return lax.bitcast_convert_type(bits, jnp.float32)
