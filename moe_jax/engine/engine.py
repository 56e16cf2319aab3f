"""Requests that come and go, decoded together: the host plans the next step while the devices run this one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32
from tqdm import tqdm

from moe_jax.engine.executor import Executor
from moe_jax.engine.generation import Candidates, Generation, Landing, Need
from moe_jax.engine.orders import Claims, Draw, Order, Piece, Writer, idle_order, order
from moe_jax.engine.sizes import Sizes, StepSize
from moe_jax.engine.stats import Latency, Meter, Stats
from moe_jax.errors import RequestError
from moe_jax.programs import Asked, Drawn, Scored
from moe_jax.requests import MOST_CANDIDATES, FinishReason
from moe_jax.sampling import NOWHERE
from moe_jax.scheduler import Plan, Request, Scheduler
from moe_jax.sharding import Placement, Role


class Flight(NamedTuple):
    """A dispatch whose results are not read yet."""

    plan: Plan
    claims: Claims
    drawn: Int32[Array, "shards*L W"]
    """Joined."""
    top: int
    """Candidates of each token."""
    scored: Scored | None


class Engine:
    """Not for several threads at once."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        sizes: Sizes,
        placement: Placement,
        writer: type[Writer] = Writer,
    ) -> None:
        self._scheduler, self._executor, self._sizes, self._placement = scheduler, executor, sizes, placement
        self._writer = writer
        self._generations: dict[Request, Generation] = {}
        self._needs: Counter[Need] = Counter()
        self._flight: Flight | None = None
        self._meter = Meter(placement.size(Role.TOKENS))

    def add(self, generation: Generation) -> None:
        """
        Raises:
          RequestError: one of this id has not ended, or it could not run even alone.
        """
        self._scheduler.add(generation.request)
        generation.last_heard = self._now()
        self._generations[generation.request] = generation
        self._needs.update(generation.needs)

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._scheduler.waiting

    @property
    def has_work(self) -> bool:
        return bool(self._generations) or self._flight is not None

    def cancel(self, generation: Generation) -> None:
        """Free its slot and pages at once. Nothing happens to one that has ended."""
        if generation.finish_reason is None:
            self._end(generation, "cancelled")

    def step(self) -> None:
        """Have the next step run, then read the results of the one before: generations that got something report it.

        If it fails or is interrupted, all that ran ends with an error, and the engine is as new.
        """
        began = self._now()
        try:
            plan = self._scheduler.plan()
            before, self._flight = self._flight, self._dispatch(plan) if plan else None
            if before:
                self._land(before)
        except BaseException:
            self._start_over()
            raise
        self._meter.busy_seconds += self._now() - began

    def _start_over(self) -> None:
        """What was planned and has not run cannot be told from what has: the cache may hold anything."""
        self._flight = None
        for generation in list(self._generations.values()):
            self._end(generation, "error", "the step that it was in failed, or was interrupted")
        self._scheduler = type(self._scheduler)(self._scheduler.limits)
        self._executor.start_over()

    def obey(self, order: Order) -> None:
        """In a process that follows: what the engine of process 0 has its executor run."""
        self._executor.obey(order)

    @property
    def stats(self) -> Stats:
        scheduler, meter = self._scheduler, self._meter
        pages = [group.pages for group in scheduler.limits.groups] * scheduler.limits.shards
        return Stats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            finished=meter.finished,
            prompt_tokens=meter.prompt_tokens,
            generated_tokens=meter.generated_tokens,
            busy_seconds=meter.busy_seconds,
            first_token=Latency.of(meter.first_token),
            between_tokens=Latency.of(meter.between_tokens),
            rows_per_shard=meter.rows_per_shard,
            balance=meter.balance,
            pad_share=meter.pad_share,
            cache_use=sum(map(sum, scheduler.used_pages)) / sum(pages),
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.prefix_hits,
        )

    def warm_up(self, variants: Sequence[Asked], *, progress: bool) -> None:
        """Compile every step that can come to be needed, for requests that ask this much.

        Raises:
          RequestError: requests are running.
        """
        if self._generations:
            raise RequestError("requests are running: warm up before there are any, or when they have ended")
        if self._flight:
            flight, self._flight = self._flight, None
            self._land(flight)
        steps = list(product(self._sizes.steps(), variants))
        for size, asked in tqdm(steps, desc="compiling", unit=" steps", disable=not progress, leave=False):
            jax.block_until_ready(self._executor.run(self._idle(size, asked)))

    def _idle(self, size: StepSize, asked: Asked) -> Order:
        return idle_order(size, self._sizes, self._placement, asked, self._writer)

    def _dispatch(self, plan: Plan) -> Flight:
        asked = Asked(
            knobs=self._needs[Need.KNOBS] > 0,
            top=MOST_CANDIDATES if self._needs[Need.CANDIDATES] else 0,
            logits=self._needs[Need.LOGITS] > 0,
        )
        wanted = self._generations.__getitem__
        orders, claims = order(plan, self._sizes, self._placement, asked, wanted, self._writer)
        self._meter.step(plan.rows, orders.turn.batch.rows.capacity, plan.steps)
        self._meter.prompt_tokens += sum(chunk.end - chunk.start for chunks in plan.chunks for chunk in chunks)
        drawn, scored = self._executor.run(orders)
        return Flight(plan, claims, drawn, asked.top, scored)

    def _land(self, flight: Flight) -> None:
        """Requests that have ended meanwhile get nothing."""
        drawn, scored = Drawn.parted(np.asarray(flight.drawn), flight.top), jax.device_get(flight.scored)
        for piece in flight.claims.pieces:
            if generation := self._generations.get(piece.request):
                _tell(generation, piece, scored)
        landings = _landings(drawn, flight.claims.draws)
        self._scheduler.landed(flight.plan, {request: landing.tokens for request, landing in landings.items()})
        now, heard, counts, first = self._now(), [], [], []
        for request, landing in landings.items():
            if (generation := self._generations.get(request)) and landing.tokens:
                heard.append(generation.last_heard)
                counts.append(len(landing.tokens))
                first.append(not generation.tokens)
                generation.last_heard = now
                if generation.wants_candidates:
                    generation.candidates += _candidates(drawn, landing, generation.params.logprobs)
                self._take(generation, landing)
        self._meter.land(now - np.array(heard), np.array(counts, int), np.array(first, bool))

    def _now(self) -> float:
        """Seconds, those of compilation left out."""
        return time.perf_counter() - self._executor.programs.compile_seconds

    def _take(self, generation: Generation, landing: Landing) -> None:
        if not landing.is_sound:
            self._end(generation, "error", "the model's logits are not numbers: its weights, or their dtype, are unfit")
            return
        generation.land(landing)
        if generation.finish_reason is None:
            generation.report()
        else:
            self._forget(generation)

    def _end(self, generation: Generation, reason: FinishReason, error: str | None = None) -> None:
        generation.finish(reason, error)
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        generation.report()
        self._scheduler.finish(generation.request.id)
        del self._generations[generation.request]
        self._needs.subtract(generation.needs)
        self._meter.finished += 1


def _landings(drawn: Any, draws: Sequence[Draw]) -> dict[Request, Landing]:
    tokens, logprobs, given = (part.tolist() for part in (drawn.tokens, drawn.logprobs, drawn.given))
    sound = np.isfinite(drawn.logprobs).all(axis=1).tolist()
    return {
        request: Landing(tokens[line][: given[line]], logprobs[line][: given[line]], line, sound[line])
        for request, line in draws
    }


def _candidates(drawn: Drawn, landing: Landing, count: int | None) -> list[Candidates]:
    rows = slice(None, len(landing.tokens)), slice(None, count)
    tokens, logprobs = (part[landing.line][rows].tolist() for part in (drawn.top_tokens, drawn.top_logprobs))
    return [_by_token(*row) for row in zip(tokens, logprobs, strict=True)]


def _by_token(tokens: list[int], logprobs: list[float]) -> Candidates:
    """Without those beyond the vocabulary."""
    return {token: logprob for token, logprob in zip(tokens, logprobs, strict=True) if token != NOWHERE}


def _tell(generation: Generation, piece: Piece, scored: Any) -> None:
    """What is asked of a prompt's tokens; of those told before it was preempted, nothing again."""
    prompt, length = generation.told_of_prompt, len(generation.request.prompt)
    if generation.wants_logits:
        known = sum(map(len, prompt.logits))
        rows = scored.logits[piece.rows][max(known - piece.start, 0) : length - piece.start]
        prompt.logits.append(np.array(rows))
    offset = piece.rows.start - piece.start
    last = min(piece.rows.stop, length - 1 + offset)
    for row in range(len(prompt.logprobs) - 1 + offset, last):
        prompt.logprobs.append(float(scored.logprobs[row]))
        best = slice(None, generation.params.prompt_logprobs)
        tokens, logprobs = scored.top_tokens[row][best].tolist(), scored.top_logprobs[row][best].tolist()
        prompt.candidates.append(_by_token(tokens, logprobs))
