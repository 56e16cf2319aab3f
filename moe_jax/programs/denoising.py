"""Steps of block diffusion as each device does them: a block of each request that runs, over the cache of those before.

S  slots of a token shard     P  positions of a sequence     B  positions of a block
L  lines of a token shard in this step: first D, each the block of a request, then those of prompts
T  its rows     K  steps of one dispatch     E  the most tokens that these give a request

A block goes through steps that choose some of its tokens, the keys and values of all being written over each time, and
then one that writes those of the tokens chosen. Where it begins, its step, and what is chosen are remembered on the
devices: so blocks that take more steps than others hold nobody up, and the host need not know how many these are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from moe_jax.config import BlockDiffusion
from moe_jax.layers import Packing, Step
from moe_jax.models import Caches
from moe_jax.models.decoder import Decoder
from moe_jax.programs.steps import Asked, Columns, Drawn, Scored, Slots, Turn, remembered, told_of_rows
from moe_jax.sampling import Drawing, Knobs, Sampled, sample
from moe_jax.sharding import Role, Route
from moe_jax.sharding.collectives import sum_devices, vary_alike
from moe_jax.sharding.rows import on_host

MASKED = -1
"""On the tape, where no token is chosen yet."""
OVER = 2**30
"""Where the block of a request begins that has all its tokens."""


class Pace(NamedTuple):
    """How the blocks of requests are decoded, Q of them."""

    threshold: Float[Array, "Q"]
    """Tokens more probable than this are chosen at once."""
    steps: Int32[Array, "Q"]
    """That choose the tokens of a block, at most; from 1 to B."""
    ends: Int32[Array, "Q"]
    """The position after the last for which a token is wanted."""

    @classmethod
    def of(cls, threshold: float, steps: int, end: int) -> Pace:
        """That of one request."""
        columns = ((threshold, np.float32), (steps, np.int32), (end, np.int32))
        return cls(*(on_host(np.array([value], dtype)) for value, dtype in columns))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockSlots(Slots):
    """With the block that each request has come to."""

    pace: Pace
    begins: Int32[Array, "S"]
    """The position of its first row."""
    steps: Int32[Array, "S"]
    """That it has been through."""
    logprobs: Float[Array, "S B"]
    """Of its tokens, when they were chosen."""

    @classmethod
    def of(cls, slot: Slots, block: int) -> BlockSlots:
        """The shapes of a slot for a request."""
        number, logprobs = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, block), jnp.float32)
        return cls(slot.tape, slot.knobs, Pace.of(1, 1, 0), number, number, logprobs)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockTurn(Turn):
    """A line that draws is the end of a prompt: what follows it is decoded from the next step on."""

    pace: Pace | None = None
    """For the slots of the last lines, as `knobs`."""


class Blocks(NamedTuple):
    """Those that D lines are at."""

    slots: Int32[Array, "D"]
    positions: Int32[Array, "D B"]
    alive: Bool[Array, "D"]
    """Whether there is one, and pages for it."""


def most_given(block: int, steps: int) -> int:
    """E: each block takes a step that chooses and one that writes, the last of them possibly in the next dispatch."""
    return block * (steps // 2 + 1)


def denoise(
    decoder: Decoder,
    caches: Caches,
    slots: BlockSlots,
    turn: BlockTurn,
    limits: Int32[Array, "D"],
    *,
    most: int,
    route: Route,
    asked: Asked,
    diffusion: BlockDiffusion,
) -> tuple[Int32[Array, "D W"], Scored | None, BlockSlots, Caches]:
    """K steps, or fewer where no line can go on; what they give, joined. Lines of prompts take part in a single one.

    Args:
      limits: for each line that is a block, the position up to which it has pages.
      most: K.
    """
    if turn.knobs is not None and turn.pace is not None:
        knobs, pace = remembered(slots.knobs, turn.knobs, turn), remembered(slots.pace, turn.pace, turn)
        slots = replace(slots, knobs=knobs, pace=pace)
    drawn = _nothing(limits, most_given(diffusion.block, most))
    axes = route.residual.placement.axes(Role.TOKENS)

    def running(slots: BlockSlots) -> Int32[Array, ""]:
        return sum_devices(jnp.sum(_blocks(slots, turn, limits, diffusion).alive, dtype=jnp.int32), axes)

    def step(drawn: Drawn, slots: BlockSlots, caches: Caches) -> tuple[Drawn, Scored | None, BlockSlots, Caches]:
        return _step(decoder, caches, slots, turn, limits, drawn, route, asked, diffusion)

    def body(carry: tuple) -> tuple:
        number, _, *state = carry
        drawn, _, slots, caches = step(*state)
        return number + 1, running(slots), drawn, slots, caches

    if most == 1:
        drawn, scored, slots, caches = step(drawn, slots, caches)
        return drawn.joined(), scored, slots, caches
    start = (jnp.zeros((), jnp.int32), running(slots), drawn, slots, caches)
    *_, drawn, slots, caches = lax.while_loop(lambda carry: (carry[0] < most) & (carry[1] > 0), body, start)
    return drawn.joined(), None, slots, caches


def _step(
    decoder: Decoder,
    caches: Caches,
    slots: BlockSlots,
    turn: BlockTurn,
    limits: Int32[Array, "D"],
    drawn: Drawn,
    route: Route,
    asked: Asked,
    diffusion: BlockDiffusion,
) -> tuple[Drawn, Scored | None, BlockSlots, Caches]:
    blocks = _blocks(slots, turn, limits, diffusion)
    packing, tape = _placed(turn.batch.packing, blocks), slots.tape
    row_slots = turn.slots.at[packing.lines].get(mode="fill", fill_value=tape.shape[0])
    on_tape = tape.at[row_slots, packing.positions].get(mode="clip")
    is_prompt = turn.batch.tokens >= 0
    tokens = jnp.where(is_prompt, turn.batch.tokens, jnp.where(on_tape == MASKED, diffusion.mask_token, on_tape))
    tape = tape.at[jnp.where(is_prompt, row_slots, tape.shape[0]), packing.positions].set(tokens, mode="drop")
    slots = replace(slots, tape=tape)

    x, caches, _ = decoder(tokens, Step.of(turn.batch.rows, packing, route, turn.slots), caches)
    with jax.named_scope("head"):
        rows = packing.starts[: limits.shape[0], None] + jnp.arange(diffusion.block)
        logits = decoder.vocabulary.logits(x.at[rows.reshape(-1)].get(mode="clip"))
    with jax.named_scope("sample"):
        proposed = _proposed(decoder, logits, slots, blocks, route, asked, diffusion)
        slots, drawn = _chosen(slots, blocks, proposed, drawn)
    return drawn, told_of_rows(decoder, x, turn, route, asked), _begun(slots, turn, limits, diffusion.block), caches


def _blocks(slots: BlockSlots, turn: BlockTurn, limits: Int32[Array, "D"], diffusion: BlockDiffusion) -> Blocks:
    own = turn.slots[: limits.shape[0]]
    begins = slots.begins.at[own].get(mode="fill", fill_value=OVER)
    positions = begins[:, None] + jnp.arange(diffusion.block)
    return Blocks(own, positions, begins + diffusion.block <= limits)


def _placed(packing: Packing, blocks: Blocks) -> Packing:
    """Rows of blocks at the positions to which these have come; those of lines that cannot go on write nothing."""
    planned = packing.positions.at[packing.starts[: blocks.slots.shape[0]]].get(mode="clip")
    moved = jnp.where(blocks.alive, blocks.positions[:, 0] - planned, 0)
    still = (~blocks.alive).at[packing.lines].get(mode="fill", fill_value=False)
    return replace(
        packing,
        lines=jnp.where(still, packing.starts.shape[0], packing.lines),
        positions=packing.positions + moved.at[packing.lines].get(mode="fill", fill_value=0),
    )


def _proposed(
    decoder: Decoder,
    logits: Float[Array, "D*B V"],
    slots: BlockSlots,
    blocks: Blocks,
    route: Route,
    asked: Asked,
    diffusion: BlockDiffusion,
) -> Sampled:
    """A token for each position, never the mask (Sahoo et al., arXiv:2406.07524). What a request draws at a position is
    the same number in each step."""
    drawing = None
    if asked.knobs:
        knobs = Knobs(*(jnp.repeat(part, diffusion.block, axis=0) for part in _of(slots.knobs, blocks)))
        drawing = Drawing(knobs, blocks.positions.reshape(-1) - knobs.prompt_length, None)
    placement = route.residual.placement
    return sample(logits, decoder.vocabulary.size, placement, drawing, never=diffusion.mask_token)


def _chosen(slots: BlockSlots, blocks: Blocks, proposed: Sampled, drawn: Drawn) -> tuple[BlockSlots, Drawn]:
    """Take the most confident of the tokens proposed, or where all were taken before, let the next block begin; blocks
    that have all their tokens now are given out."""
    (own, positions, alive), (_, block) = blocks, blocks.positions.shape
    nowhere, begins = slots.begins.shape[0], positions[:, 0]
    pace, knobs = _of(slots.pace, blocks), _of(slots.knobs, blocks)
    step = slots.steps.at[own].get(mode="clip")
    held = slots.tape.at[own[:, None], positions].get(mode="clip")
    masked = (held == MASKED) & alive[:, None]
    is_written = alive & ~masked.any(axis=1)

    tokens, logprobs = (part.reshape(masked.shape) for part in proposed[:2])
    steps = jnp.maximum(pace.steps, 1)  # slots that nobody has had say 0
    least = block // steps + (step < block % steps)
    taken = confident(logprobs, masked, pace.threshold, least)
    held = jnp.where(taken, tokens, held)
    told = jnp.where(taken, logprobs, slots.logprobs.at[own].get(mode="clip"))
    is_full = alive & ~is_written & ~(masked & ~taken).any(axis=1)
    wanted = (positions >= knobs.prompt_length[:, None]) & (positions < pace.ends[:, None])
    stops = (wanted & (held[..., None] == knobs.end_ids[:, None]).any(axis=-1)).any(axis=1)
    is_over = is_full & (stops | (begins + block >= pace.ends))

    later = begins + block * is_written
    into = jnp.where(alive, own, nowhere)
    held = jnp.where(is_written[:, None], MASKED, held)
    return replace(
        slots,
        tape=slots.tape.at[into[:, None], later[:, None] + jnp.arange(block)].set(held, mode="drop"),
        logprobs=slots.logprobs.at[into].set(told, mode="drop"),
        begins=slots.begins.at[into].set(jnp.where(is_over, OVER, later), mode="drop"),
        steps=slots.steps.at[into].set(jnp.where(is_written, 0, step + 1), mode="drop"),
    ), _given(drawn, held, told, wanted & is_full[:, None])


def _of(kept: Columns, blocks: Blocks) -> Columns:
    """What is kept of the requests of some blocks."""
    return type(kept)(*(column.at[blocks.slots].get(mode="clip") for column in kept))


def confident(
    logprobs: Float[Array, "D B"],
    masked: Bool[Array, "D B"],
    threshold: Float[Array, "D"],
    least: Int32[Array, "D"],
) -> Bool[Array, "D B"]:
    """The masked positions whose token is more probable than the threshold; where these are fewer than `least`, as many
    of the most probable, of equals the first."""
    sure = masked & (jnp.exp(logprobs) > threshold[:, None])
    confidence = jnp.where(masked, logprobs, -jnp.inf)
    ours, others = confidence[:, :, None], confidence[:, None]
    earlier = jnp.tri(masked.shape[1], k=-1, dtype=bool)
    ahead = masked[:, None] & ((others > ours) | ((others == ours) & earlier))
    best = masked & (ahead.sum(axis=-1) < least[:, None])
    return jnp.where((sure.sum(axis=1) >= least)[:, None], sure, best)


def _given(drawn: Drawn, tokens: Int32[Array, "D B"], logprobs: Float[Array, "D B"], new: Bool[Array, "D B"]) -> Drawn:
    """With the new ones of a block after those given before."""
    lines = jnp.arange(new.shape[0])[:, None]
    at = jnp.where(new, drawn.given[:, None] + jnp.cumsum(new, axis=1, dtype=jnp.int32) - 1, drawn.tokens.shape[1])
    return drawn._replace(
        tokens=drawn.tokens.at[lines, at].set(tokens, mode="drop"),
        logprobs=drawn.logprobs.at[lines, at].set(logprobs, mode="drop"),
        given=drawn.given + new.sum(axis=1, dtype=jnp.int32),
    )


def _begun(slots: BlockSlots, turn: BlockTurn, limits: Int32[Array, "D"], block: int) -> BlockSlots:
    """With the first blocks of the requests whose prompts end in this step: what of them the prompt does not fill is
    masked."""
    packing, lines = turn.batch.packing, slice(limits.shape[0], None)
    last = packing.starts[lines] + packing.lengths[lines] - 1
    known = packing.positions.at[last].get(mode="clip") + 1
    begins = known // block * block
    nowhere, positions = slots.tape.shape
    into = jnp.where(turn.draws[lines], turn.slots[lines], nowhere)
    open_places = known[:, None] + jnp.arange(block)
    open_places = jnp.where(open_places < begins[:, None] + block, open_places, positions)
    return replace(
        slots,
        tape=slots.tape.at[into[:, None], open_places].set(MASKED, mode="drop"),
        begins=slots.begins.at[into].set(begins, mode="drop"),
        steps=slots.steps.at[into].set(0, mode="drop"),
    )


def _nothing(limits: Int32[Array, "D"], most: int) -> Drawn:
    """No tokens, and room for so many."""

    def zeros(*rest: int, dtype: type = jnp.int32) -> Shaped[Array, "D ..."]:
        return vary_alike(jnp.zeros((limits.shape[0], *rest), dtype), limits)[0]

    real = jnp.float32
    return Drawn(zeros(most), zeros(most, dtype=real), zeros(most, 0), zeros(most, 0, dtype=real), zeros())
