"""Changes to the logits before sampling: logit bias, penalties, and stop tokens that `min_tokens` holds back."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from moe_jax.programs.sampling.metadata import SamplerInputs, SamplingMetadata
from moe_jax.programs.sampling.vocab_shard import VocabShard


def process_logits(logits: Float[Array, "Q V"], shard: VocabShard, inputs: SamplerInputs) -> Float[Array, "Q V"]:
    """Apply logit biases, penalties and `min_tokens`; each is skipped at run time if no request uses it."""
    sampling, generated, history = inputs
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = lax.cond(
        (sampling.bias_values != 0).any(),
        lambda: logits.at[rows, shard.columns(sampling.bias_ids)].add(sampling.bias_values, mode="drop"),
        lambda: logits,
    )
    if history is not None:
        penalized = (
            (sampling.repetition_penalty != 1) | (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)
        )
        logits = lax.cond(
            penalized.any(), lambda: _penalize(logits, shard, sampling, generated, history), lambda: logits
        )
    early = generated < sampling.min_tokens
    stops = jnp.where(early[:, None], shard.columns(sampling.stop_ids), shard.size)
    return lax.cond(early.any(), lambda: logits.at[rows, stops].set(-jnp.inf, mode="drop"), lambda: logits)


def _penalize(
    logits: Float[Array, "Q V"],
    shard: VocabShard,
    sampling: SamplingMetadata,
    generated: Int32[Array, "Q"],
    history: Int32[Array, "Q P"],
) -> Float[Array, "Q V"]:
    """Apply the repetition penalty to tokens of prompt and output, the other penalties to tokens of the output."""
    position, prompt = jnp.arange(history.shape[1]), sampling.prompt_length[:, None]
    valid = position < prompt + generated[:, None]
    rows, columns = jnp.arange(logits.shape[0])[:, None], shard.columns(history)
    zeros = jnp.zeros_like(logits, jnp.int32)
    seen = zeros.at[rows, columns].max(valid.astype(jnp.int32), mode="drop") > 0
    counts = zeros.at[rows, columns].add((valid & (position >= prompt)).astype(jnp.int32), mode="drop")
    penalty = sampling.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    return logits - sampling.presence_penalty[:, None] * (counts > 0) - sampling.frequency_penalty[:, None] * counts
