"""Steps of block diffusion, as each device runs them: each step runs the current block of every decoding request.

S  slots of a token shard     P  positions of a sequence     B  positions of a block
L  segments of a token shard: D blocks of decoding requests, then pieces of prompts     T  its rows
K  steps of one dispatch      E  tokens that a request can emit in K steps

Each step of a block rewrites the keys and values of all its positions and unmasks some of its tokens (LLaDA,
arXiv:2502.09992). When all tokens are unmasked, one more step writes their final keys and values. The devices remember
where each request's block begins and which step it is at, so no block waits for a slower one, and the host plans
without knowing how many steps a block takes.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.kernels.forward_batch import ForwardBatch
from moe_jax.kernels.step import Step
from moe_jax.models import Caches
from moe_jax.models.decoder import Decoder
from moe_jax.programs.diffusion_input import (
    FINISHED,
    MASKED,
    CurrentBlocks,
    DiffusionSlots,
    DiffusionStepInput,
    current_blocks,
)
from moe_jax.programs.outputs import RowLogprobs, SampledTokens, row_logprobs
from moe_jax.programs.sampling import SamplerInputs, SamplerOutput, SamplingMetadata, sample
from moe_jax.programs.step_input import feed, rows_of, update_rows
from moe_jax.sharding import Role, Route
from moe_jax.sharding.collectives import sum_devices


def max_emitted(block: int, steps: int) -> int:
    """Bound the number of tokens that a request emits in `steps` steps (E).

    A block takes at least one step that unmasks tokens and one that writes the final keys and values. The next dispatch
    may do the writing of the last block.
    """
    return block * (steps // 2 + 1)


def denoise(
    decoder: Decoder, caches: Caches, slots: DiffusionSlots, step_input: DiffusionStepInput, route: Route
) -> tuple[Int32[Array, "D W"], RowLogprobs | None, DiffusionSlots, Caches]:
    """Run up to K steps, and stop early if no request has a block with pages. Only a single step (K = 1) has prompts.

    Returns:
      The packed `SampledTokens`, the scores of targets, and the updated slots and caches.
    """
    assert step_input.limits is not None
    if step_input.sampling is not None and step_input.schedule is not None:
        sampling = update_rows(slots.sampling, step_input.prompt_slots, step_input.sampling)
        schedule = update_rows(slots.schedule, step_input.prompt_slots, step_input.schedule)
        slots = replace(slots, sampling=sampling, schedule=schedule)
    max_steps, axes = step_input.max_steps, route.residual.placement.axes(Role.TOKENS)
    emitted = SampledTokens.empty(step_input.limits, max_emitted(step_input.diffusion.block, max_steps), 0)

    def running(slots: DiffusionSlots) -> Int32[Array, ""]:
        return sum_devices(jnp.sum(current_blocks(slots, step_input).alive, dtype=jnp.int32), axes)

    def body(carry: tuple) -> tuple:
        step, _, emitted, slots, caches = carry
        emitted, _, slots, caches = _step(decoder, caches, slots, step_input, emitted, route)
        return step + 1, running(slots), emitted, slots, caches

    if max_steps == 1:
        emitted, scored, slots, caches = _step(decoder, caches, slots, step_input, emitted, route)
        return emitted.pack(), scored, slots, caches
    start = (jnp.zeros((), jnp.int32), running(slots), emitted, slots, caches)
    *_, emitted, slots, caches = lax.while_loop(lambda carry: (carry[0] < max_steps) & (carry[1] > 0), body, start)
    return emitted.pack(), None, slots, caches


def _step(
    decoder: Decoder,
    caches: Caches,
    slots: DiffusionSlots,
    step_input: DiffusionStepInput,
    emitted: SampledTokens,
    route: Route,
) -> tuple[SampledTokens, RowLogprobs | None, DiffusionSlots, Caches]:
    diffusion, blocks = step_input.diffusion, current_blocks(slots, step_input)
    batch = _at_blocks(step_input.batch, blocks)
    tokens, slots = feed(slots, step_input, batch)
    tokens = jnp.where(tokens == MASKED, diffusion.mask_token, tokens)
    x, caches, _ = decoder(tokens, Step.of(batch, route, step_input.slots), caches)
    with jax.named_scope("head"):
        rows = batch.starts[: blocks.slots.shape[0], None] + jnp.arange(diffusion.block)
        logits = decoder.vocabulary.logits(x.at[rows.reshape(-1)].get(mode="clip"))
    with jax.named_scope("sample"):
        proposed = _propose(decoder, logits, slots, blocks, step_input, route)
        slots, emitted = _choose(slots, blocks, proposed, emitted)
    return emitted, row_logprobs(decoder, x, step_input, route), _begin(slots, step_input), caches


def _at_blocks(batch: ForwardBatch, blocks: CurrentBlocks) -> ForwardBatch:
    """Move the rows of blocks to their current positions. Segments without a block read and write nothing."""
    planned = batch.positions.at[batch.starts[: blocks.slots.shape[0]]].get(mode="clip")
    shifts = jnp.where(blocks.alive, blocks.positions[:, 0] - planned, 0)
    idle = (~blocks.alive).at[batch.segments].get(mode="fill", fill_value=False)
    return replace(
        batch,
        segments=jnp.where(idle, batch.starts.shape[0], batch.segments),
        positions=batch.positions + shifts.at[batch.segments].get(mode="fill", fill_value=0),
        lengths=batch.lengths.at[: blocks.alive.shape[0]].multiply(blocks.alive),
    )


def _propose(
    decoder: Decoder,
    logits: Float[Array, "D*B V"],
    slots: DiffusionSlots,
    blocks: CurrentBlocks,
    step_input: DiffusionStepInput,
    route: Route,
) -> SamplerOutput:
    """Sample a token for each position, never the mask (Sahoo et al., arXiv:2406.07524).

    A request draws the same random number for a position in every step.
    """
    diffusion, inputs = step_input.diffusion, None
    if step_input.flags.sampling:
        requests = rows_of(slots.sampling, blocks.slots)
        sampling = SamplingMetadata(*(jnp.repeat(column, diffusion.block, axis=0) for column in requests))
        inputs = SamplerInputs(sampling, blocks.positions.reshape(-1) - sampling.prompt_length, None)
    placement = route.residual.placement
    return sample(logits, decoder.vocabulary.size, placement, inputs, excluded_token=diffusion.mask_token)


def _choose(
    slots: DiffusionSlots, blocks: CurrentBlocks, proposed: SamplerOutput, emitted: SampledTokens
) -> tuple[DiffusionSlots, SampledTokens]:
    """Unmask the most confident proposed tokens.

    A block that this step completes is emitted. A block that was complete before this step, and whose final keys and
    values are therefore written now, makes room for the next block.
    """
    (slot_ids, positions, alive), (_, block) = blocks, blocks.positions.shape
    pad_slot, begins = slots.begins.shape[0], positions[:, 0]
    schedule, sampling = rows_of(slots.schedule, slot_ids), rows_of(slots.sampling, slot_ids)
    step = slots.steps.at[slot_ids].get(mode="clip")
    tokens = slots.token_buffer.at[slot_ids[:, None], positions].get(mode="clip")
    masked = (tokens == MASKED) & alive[:, None]
    was_full = alive & ~masked.any(axis=1)

    proposed_tokens, proposed_logprobs = (part.reshape(masked.shape) for part in proposed[:2])
    steps = jnp.maximum(schedule.steps, 1)  # an unused slot holds 0
    quota = block // steps + (step < block % steps)
    chosen = confident(proposed_logprobs, masked, schedule.threshold, quota)
    tokens = jnp.where(chosen, proposed_tokens, tokens)
    logprobs = jnp.where(chosen, proposed_logprobs, slots.logprobs.at[slot_ids].get(mode="clip"))
    is_full = alive & ~was_full & ~(masked & ~chosen).any(axis=1)
    wanted = (positions >= sampling.prompt_length[:, None]) & (positions < schedule.ends[:, None])
    stops = (wanted & (tokens[..., None] == sampling.stop_ids[:, None]).any(axis=-1)).any(axis=1)
    is_last = is_full & (stops | (begins + block >= schedule.ends))

    begins += block * was_full
    into = jnp.where(alive, slot_ids, pad_slot)
    tokens = jnp.where(was_full[:, None], MASKED, tokens)
    buffer = slots.token_buffer.at[into[:, None], begins[:, None] + jnp.arange(block)].set(tokens, mode="drop")
    return replace(
        slots,
        token_buffer=buffer,
        logprobs=slots.logprobs.at[into].set(logprobs, mode="drop"),
        begins=slots.begins.at[into].set(jnp.where(is_last, FINISHED, begins), mode="drop"),
        steps=slots.steps.at[into].set(jnp.where(was_full, 0, step + 1), mode="drop"),
    ), _emit(emitted, tokens, logprobs, wanted & is_full[:, None])


def confident(
    logprobs: Float[Array, "D B"],
    masked: Bool[Array, "D B"],
    threshold: Float[Array, "D"],
    quota: Int32[Array, "D"],
) -> Bool[Array, "D B"]:
    """Choose the masked positions whose token is more probable than the threshold.

    If there are fewer than the quota, choose the `quota` most probable ones instead, earlier positions first among
    equals.
    """
    above = masked & (jnp.exp(logprobs) > threshold[:, None])
    confidence = jnp.where(masked, logprobs, -jnp.inf)
    one, other = confidence[:, :, None], confidence[:, None]
    earlier = jnp.tri(masked.shape[1], k=-1, dtype=bool)
    ahead = masked[:, None] & ((other > one) | ((other == one) & earlier))
    best = masked & (ahead.sum(axis=-1) < quota[:, None])
    return jnp.where((above.sum(axis=1) >= quota)[:, None], above, best)


def _emit(
    emitted: SampledTokens, tokens: Int32[Array, "D B"], logprobs: Float[Array, "D B"], new: Bool[Array, "D B"]
) -> SampledTokens:
    """Append the `new` tokens of each block."""
    segments = jnp.arange(new.shape[0])[:, None]
    place = emitted.counts[:, None] + jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(new, place, emitted.tokens.shape[1])
    return emitted._replace(
        tokens=emitted.tokens.at[segments, place].set(tokens, mode="drop"),
        logprobs=emitted.logprobs.at[segments, place].set(logprobs, mode="drop"),
        counts=emitted.counts + new.sum(axis=1, dtype=jnp.int32),
    )


def _begin(slots: DiffusionSlots, step_input: DiffusionStepInput) -> DiffusionSlots:
    """Start the first block of requests whose prompts end in this step: mask its positions after the prompt."""
    assert step_input.limits is not None
    batch, block = step_input.batch, step_input.diffusion.block
    prompts = slice(step_input.limits.shape[0], None)
    last = batch.starts[prompts] + batch.lengths[prompts] - 1
    length = batch.positions.at[last].get(mode="clip") + 1
    begins = length // block * block
    pad_slot, positions = slots.token_buffer.shape
    into = jnp.where(step_input.samples[prompts], step_input.slots[prompts], pad_slot)
    masked = length[:, None] + jnp.arange(block)
    masked = jnp.where(masked < begins[:, None] + block, masked, positions)
    return replace(
        slots,
        token_buffer=slots.token_buffer.at[into[:, None], masked].set(MASKED, mode="drop"),
        begins=slots.begins.at[into].set(begins, mode="drop"),
        steps=slots.steps.at[into].set(0, mode="drop"),
    )
