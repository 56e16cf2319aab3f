"""Steps of a model that decodes token by token, as each device runs them: forward, sample, write to the token buffer.

S  slots of a token shard     P  positions of a sequence     L  segments of a token shard     T  its rows
K  steps of one dispatch
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from moe_jax.kernels.step import Step
from moe_jax.models import Caches
from moe_jax.models.decoder import Decoder
from moe_jax.programs.outputs import RowLogprobs, SampledTokens, row_logprobs
from moe_jax.programs.sampling import SamplerInputs, SamplerOutput, sample
from moe_jax.programs.step_input import Slots, StepInput, feed, rows_of, update_rows
from moe_jax.sharding import Role, Route
from moe_jax.sharding.collectives import sum_devices


def advance(
    decoder: Decoder, caches: Caches, slots: Slots, step_input: StepInput, route: Route
) -> tuple[Int32[Array, "L W"], RowLogprobs | None, Slots, Caches]:
    """Run one step of prompts and decoding requests; every segment that samples emits one token.

    Returns:
      The packed `SampledTokens`, the scores of targets, and the updated slots and caches.
    """
    if step_input.sampling is not None:
        sampling = update_rows(slots.sampling, step_input.prompt_slots, step_input.sampling)
        slots = replace(slots, sampling=sampling)
    sampled, scored, slots, caches = _step(decoder, caches, slots, step_input, route)
    counts = step_input.samples.astype(jnp.int32)
    return SampledTokens(*[part[:, None] for part in sampled], counts=counts).pack(), scored, slots, caches


def decode(
    decoder: Decoder, caches: Caches, slots: Slots, step_input: StepInput, route: Route
) -> tuple[Int32[Array, "L W"], None, Slots, Caches]:
    """Run up to K decode steps in a loop; each step feeds every segment the token that the step before sampled.

    A segment ends when it emits a stop token or reaches its limit. The loop ends when the segments of all token shards
    have ended.

    Returns:
      The same values as `advance`; the scores are None.
    """
    assert step_input.limits is not None
    limits, axes = step_input.limits, route.residual.placement.axes(Role.TOKENS)
    stop_ids = slots.sampling.stop_ids.at[step_input.slots].get(mode="clip")

    def running(alive: Bool[Array, "L"]) -> Int32[Array, ""]:
        return sum_devices(jnp.sum(alive, dtype=jnp.int32), axes)

    def body(carry: tuple) -> tuple:
        step, _, alive, emitted, slots, caches = carry
        sampled, _, slots, caches = _step(decoder, caches, slots, _at_step(step_input, step, alive), route)
        columns = [column.at[:, step].set(new) for column, new in zip(emitted[:-1], sampled, strict=True)]
        emitted = SampledTokens(*columns, counts=emitted.counts + alive)
        alive &= (emitted.counts < limits) & ~jnp.any(sampled.tokens[:, None] == stop_ids, axis=-1)
        return step + 1, running(alive), alive, emitted, slots, caches

    alive = step_input.samples & (limits > 0)
    emitted = SampledTokens.empty(limits, step_input.max_steps, step_input.flags.top_logprobs)
    start = (jnp.zeros((), jnp.int32), running(alive), alive, emitted, slots, caches)
    *_, emitted, slots, caches = lax.while_loop(lambda carry: carry[1] > 0, body, start)
    return emitted.pack(), None, slots, caches


def _step(
    decoder: Decoder, caches: Caches, slots: Slots, step_input: StepInput, route: Route
) -> tuple[SamplerOutput, RowLogprobs | None, Slots, Caches]:
    batch, flags = step_input.batch, step_input.flags
    tokens, slots = feed(slots, step_input, batch)
    x, caches, _ = decoder(tokens, Step.of(batch, route, step_input.slots), caches)
    with jax.named_scope("head"):
        last = batch.starts + batch.lengths - 1
        logits = decoder.vocabulary.logits(x.at[last].get(mode="clip"))
    with jax.named_scope("sample"):
        buffer, next_position = slots.token_buffer, batch.positions.at[last].get(mode="clip") + 1
        inputs = None
        if flags.sampling:
            sampling = rows_of(slots.sampling, step_input.slots)
            history = buffer.at[step_input.slots].get(mode="clip")
            inputs = SamplerInputs(sampling, next_position - sampling.prompt_length, history)
        placement = route.residual.placement
        sampled = sample(logits, decoder.vocabulary.size, placement, inputs, top=flags.top_logprobs)
    into = jnp.where(step_input.samples, step_input.slots, buffer.shape[0])
    slots = replace(slots, token_buffer=buffer.at[into, next_position].set(sampled.tokens, mode="drop"))
    return sampled, row_logprobs(decoder, x, step_input, route), slots, caches


def _at_step(step_input: StepInput, step: Int32[Array, ""], alive: Bool[Array, "L"]) -> StepInput:
    """Move the input to a later step of the loop. Segments that have ended read and write nothing."""
    batch = step_input.batch
    ended = ~alive.at[batch.segments].get(mode="fill", fill_value=False)
    batch = replace(
        batch,
        segments=jnp.where(ended, step_input.slots.shape[0], batch.segments),
        positions=batch.positions + step,
        lengths=jnp.where(alive, batch.lengths, 0),
    )
    return replace(step_input, batch=batch, samples=alive)
