"""Log-probabilities of tokens, and of the most likely ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.programs.sampling.vocab_shard import NO_TOKEN, VocabShard
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.collectives import all_gather_same


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities of tokens under the unmodified logits."""

    logprobs: Float[Array, "Q"]
    top_tokens: Int32[Array, "Q C"]
    """Most likely tokens, most likely first, the lowest id first among equals; `NO_TOKEN` beyond the vocabulary."""
    top_logprobs: Float[Array, "Q C"]


def logprobs_of(
    logits: Float[Array, "Q V"], tokens: Int32[Array, "Q"], vocab_size: int, placement: Placement, *, top: int = 0
) -> TokenLogprobs:
    """Log-probability of each token, and the `top` most likely tokens of its row."""
    shard = VocabShard.of(logits, vocab_size, placement)
    return token_logprobs(shard.mask_padding(logits), tokens, shard, top)


def token_logprobs(
    logits: Float[Array, "Q V"], tokens: Int32[Array, "Q"], shard: VocabShard, top: int
) -> TokenLogprobs:
    """Compute `logprobs_of` from logits whose padding is masked."""
    total = jax.nn.logsumexp(shard.all_gather(jax.nn.logsumexp(logits, axis=-1)), axis=0)
    held = shard.holds(tokens)
    logit = jnp.take_along_axis(logits, jnp.where(held, shard.columns(tokens), 0)[:, None], axis=-1)[:, 0]
    chosen = shard.all_reduce(jnp.where(held, logit, 0))
    top_tokens, top_logits = _top(logits, shard, top)
    return TokenLogprobs(chosen - total, top_tokens, top_logits - total[:, None])


def _top(logits: Float[Array, "Q V"], shard: VocabShard, top: int) -> tuple[Int32[Array, "Q C"], Float[Array, "Q C"]]:
    """The `top` most likely tokens and their logits, chosen among the `top` of each shard."""
    if not top:
        return jnp.zeros((logits.shape[0], 0), jnp.int32), jnp.zeros((logits.shape[0], 0))
    values, columns = lax.top_k(logits, min(top, shard.size))
    axes = shard.placement.axes(Role.HEADS)
    values, tokens = (all_gather_same(part, axes, dim=1) for part in (values, shard.first + columns))
    missing = max(top - values.shape[1], 0)
    values = jnp.pad(values, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    values, places = lax.top_k(values, top)
    tokens = jnp.take_along_axis(jnp.pad(tokens, ((0, 0), (0, missing))), places, axis=1)
    return jnp.where(values > -jnp.inf, tokens, NO_TOKEN), values
