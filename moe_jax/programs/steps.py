"""One step of all requests that run, as each device does it: forward, draw, remember.

S  slots of a token shard: places of requests that run at once     P  positions of a sequence
L  lines of a token shard in this step     T  its rows              K  steps of one dispatch
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.layers import Step
from moe_jax.models import Batch, Caches
from moe_jax.models.decoder import Decoder
from moe_jax.sampling import Drawing, Knobs, Sampled, logprobs_of, sample
from moe_jax.sharding import Role, Route
from moe_jax.sharding.collectives import sum_devices, vary_alike
from moe_jax.sharding.rows import on_host

Columns = TypeVar("Columns", bound=tuple[Any, ...])
"""Named arrays with a row for each request."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """What the devices remember of each request that runs, so that the host need not wait for a token to ask for the
    next one."""

    tape: Int32[Array, "S P"]
    """The tokens of each sequence, by position."""
    knobs: Knobs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Turn:
    """A step's rows, and the slots that they belong to."""

    batch: Batch
    """Tokens below 0 are to be read from the tape."""
    slots: Int32[Array, "L"]
    """The slot of each line; S for a line without rows."""
    draws: Bool[Array, "L"]
    """Whether the last row of a line chooses a token."""
    knobs: Knobs | None
    """For the slots of the last lines, those of prompts: how tokens are to be drawn."""
    targets: Int32[Array, "T"] | None = None
    """The token after each row, where its log-probability is asked for."""


@dataclass(frozen=True)
class Asked:
    """What is computed besides the likeliest token; static, for it makes another program."""

    knobs: bool = False
    """Whether any request does more than take the likeliest token."""
    top: int = 0
    """How many of the likeliest tokens are wanted with their log-probabilities."""
    logits: bool = False
    """Whether the logits after every row are wanted, where targets are scored."""


class Drawn(NamedTuple):
    tokens: Int32[Array, "L K"]
    logprobs: Float[Array, "L K"]
    top_tokens: Int32[Array, "L K top"]
    top_logprobs: Float[Array, "L K top"]
    given: Int32[Array, "L"]
    """How many of the tokens count."""

    def joined(self) -> Int32[Array, "L W"]:
        """All of it in one array, for the host's work is the same for each that it reads."""
        columns = (lax.bitcast_convert_type(part, jnp.int32).reshape(len(self.given), -1) for part in self)
        return jnp.concatenate(list(columns), axis=1)

    @classmethod
    def parted(cls, joined: np.ndarray, top: int) -> Drawn:
        """What was joined, on the host."""
        lines, words = joined.shape
        steps = (words - 1) // (2 + 2 * top)
        ends = np.cumsum([steps, steps, steps * top, steps * top])
        tokens, logprobs, top_tokens, top_logprobs, given = np.split(joined, ends, axis=1)
        logprobs, top_logprobs = logprobs.view(np.float32), top_logprobs.view(np.float32)
        of_top = (part.reshape(lines, steps, top) for part in (top_tokens, top_logprobs))
        return cls(*map(on_host, (tokens, logprobs, *of_top, given[:, 0])))


class Scored(NamedTuple):
    """Of the targets of all rows."""

    logprobs: Float[Array, "T"]
    top_tokens: Int32[Array, "T top"]
    top_logprobs: Float[Array, "T top"]
    logits: Float[Array, "T vocab"] | None


def advance(
    decoder: Decoder, caches: Caches, slots: Slots, turn: Turn, *, route: Route, asked: Asked
) -> tuple[Int32[Array, "L W"], Scored | None, Slots, Caches]:
    """One step, and what it gives, joined; every line that draws gives one token."""
    if turn.knobs is not None:
        slots = replace(slots, knobs=remembered(slots.knobs, turn.knobs, turn))
    sampled, scored, slots, caches = _step(decoder, caches, slots, turn, route, asked)
    tokens, logprobs, top_tokens, top_logprobs = (part[:, None] for part in sampled)
    given = turn.draws.astype(jnp.int32)
    return Drawn(tokens, logprobs, top_tokens, top_logprobs, given).joined(), scored, slots, caches


def decode(
    decoder: Decoder,
    caches: Caches,
    slots: Slots,
    turn: Turn,
    budgets: Int32[Array, "L"],
    *,
    most: int,
    route: Route,
    asked: Asked,
) -> tuple[Int32[Array, "L W"], None, Slots, Caches]:
    """Up to K steps, in each of which every line takes the token that the step before gave it; what they give, joined.

    A line ends when it has as many tokens as its budget says, or an end token; all of them end the loop.

    Args:
      budgets: at most K.
      most: K.
    """
    lines, axes = turn.slots.shape[0], route.residual.placement.axes(Role.TOKENS)
    end_ids = slots.knobs.end_ids.at[turn.slots].get(mode="clip")

    def running(alive: Bool[Array, "L"]) -> Int32[Array, ""]:
        return sum_devices(jnp.sum(alive, dtype=jnp.int32), axes)

    def body(carry: tuple) -> tuple:
        number, _, alive, drawn, slots, caches = carry
        sampled, _, slots, caches = _step(decoder, caches, slots, _later(turn, number, alive), route, asked)
        columns = (all.at[:, number].set(new) for all, new in zip(drawn[:-1], sampled, strict=True))
        drawn = drawn._replace(**dict(zip(sampled._fields, columns, strict=True)), given=drawn.given + alive)
        alive &= (drawn.given < budgets) & ~jnp.any(sampled.tokens[:, None] == end_ids, axis=-1)
        return number + 1, running(alive), alive, drawn, slots, caches

    empty = [
        jnp.zeros((lines, most, *rest), dtype)
        for rest, dtype in (((), int), ((), jnp.float32), ((asked.top,), int), ((asked.top,), jnp.float32))
    ]
    alive = turn.draws & (budgets > 0)
    tokens, logprobs, top_tokens, top_logprobs = (vary_alike(part, budgets)[0] for part in empty)
    drawn = Drawn(tokens, logprobs, top_tokens, top_logprobs, jnp.zeros_like(budgets))
    start = (jnp.zeros((), jnp.int32), running(alive), alive, drawn, slots, caches)
    *_, drawn, slots, caches = lax.while_loop(lambda carry: carry[1] > 0, body, start)
    return drawn.joined(), None, slots, caches


def _step(
    decoder: Decoder, caches: Caches, slots: Slots, turn: Turn, route: Route, asked: Asked
) -> tuple[Sampled, Scored | None, Slots, Caches]:
    packing, here, tape = turn.batch.packing, route.residual.placement, slots.tape
    row_slots = turn.slots.at[packing.lines].get(mode="fill", fill_value=tape.shape[0])
    on_tape = tape.at[row_slots, packing.positions].get(mode="clip")
    tokens = jnp.where(turn.batch.tokens < 0, on_tape, turn.batch.tokens)
    tape = tape.at[row_slots, packing.positions].set(tokens, mode="drop")

    x, caches, _ = decoder(tokens, Step.of(turn.batch.rows, packing, route, turn.slots), caches)
    with jax.named_scope("head"):
        last = packing.starts + packing.lengths - 1
        logits = decoder.vocabulary.logits(x.at[last].get(mode="clip"))
    with jax.named_scope("sample"):
        after = packing.positions.at[last].get(mode="clip") + 1
        drawing = None
        if asked.knobs:
            knobs = Knobs(*(part.at[turn.slots].get(mode="clip") for part in slots.knobs))
            drawing = Drawing(knobs, after - knobs.prompt_length, tape.at[turn.slots].get(mode="clip"))
        sampled = sample(logits, decoder.vocabulary.size, here, drawing, top=asked.top)
    into = jnp.where(turn.draws, turn.slots, tape.shape[0])
    tape = tape.at[into, after].set(sampled.tokens, mode="drop")
    return sampled, told_of_rows(decoder, x, turn, route, asked), replace(slots, tape=tape), caches


def told_of_rows(decoder: Decoder, x: Float[Array, "T D"], turn: Turn, route: Route, asked: Asked) -> Scored | None:
    """What is asked of each row, where anything is."""
    if turn.targets is None:
        return None
    with jax.named_scope("score"):
        vocabulary, residual = decoder.vocabulary, route.residual
        told = logprobs_of(vocabulary.logits(x), turn.targets, vocabulary.size, residual.placement, top=asked.top)
        return Scored(*told, logits=vocabulary.all_logits(x, residual) if asked.logits else None)


def remembered(kept: Columns, told: Columns, turn: Turn) -> Columns:
    """What is kept of each slot, with what a turn tells of those of its last lines."""
    slots = turn.slots[-told[0].shape[0] :]
    return type(kept)(*(all.at[slots].set(new, mode="drop") for all, new in zip(kept, told, strict=True)))


def _later(turn: Turn, steps: Int32[Array, ""], alive: Bool[Array, "L"]) -> Turn:
    """The turn so many steps later; lines that have ended write nothing."""
    packing = turn.batch.packing
    ended = ~alive.at[packing.lines].get(mode="fill", fill_value=False)
    packing = replace(
        packing,
        lines=jnp.where(ended, turn.slots.shape[0], packing.lines),
        positions=packing.positions + steps,
    )
    return replace(turn, batch=replace(turn.batch, packing=packing), draws=alive)
