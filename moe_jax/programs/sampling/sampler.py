"""The sampler: logits to tokens and their log-probabilities."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.programs.sampling.drawing import draw
from moe_jax.programs.sampling.logprobs import token_logprobs
from moe_jax.programs.sampling.metadata import SamplerInputs
from moe_jax.programs.sampling.penalties import process_logits
from moe_jax.programs.sampling.thresholds import truncated_weights
from moe_jax.programs.sampling.vocab_shard import VocabShard
from moe_jax.sharding import Placement


class SamplerOutput(NamedTuple):
    """Sampled tokens, and the fields of their `TokenLogprobs`."""

    tokens: Int32[Array, "Q"]
    logprobs: Float[Array, "Q"]
    top_tokens: Int32[Array, "Q C"]
    top_logprobs: Float[Array, "Q C"]


def sample(
    logits: Float[Array, "Q V"],
    vocab_size: int,
    placement: Placement,
    inputs: SamplerInputs | None,
    *,
    excluded_token: int | None = None,
    top: int = 0,
) -> SamplerOutput:
    """Sample the next token of each request: a random draw if its temperature is above 0, else the most likely token.

    Args:
      logits: float32; columns beyond `vocab_size` are padding with any content.
      inputs: `None` if all requests are greedy and none changes its logits.
      excluded_token: Token with probability 0, in log-probabilities too.
      top: C, the number of most likely tokens to return.
    """
    shard = VocabShard.of(logits, vocab_size, placement)
    logits = shard.mask_padding(logits)
    if excluded_token is not None:
        logits = shard.mask_token(excluded_token, logits)
    if inputs is None:
        _, tokens = shard.argmax(logits)
    else:
        tokens = _sample_tokens(logits, shard, inputs)
    return SamplerOutput(tokens, *token_logprobs(logits, tokens, shard, top))


def _sample_tokens(logits: Float[Array, "Q V"], shard: VocabShard, inputs: SamplerInputs) -> Int32[Array, "Q"]:
    sampling, generated, _ = inputs
    with jax.named_scope("process_logits"):
        processed = process_logits(logits, shard, inputs)
    best, greedy = shard.argmax(processed)

    def drawn() -> Int32[Array, "Q"]:
        weights = truncated_weights(processed, best, shard, sampling)
        return jnp.where(is_random, draw(weights, shard, sampling.seed, generated), greedy)

    with jax.named_scope("draw"):
        is_random = sampling.temperature > 0
        return lax.cond(is_random.any(), drawn, lambda: greedy)
