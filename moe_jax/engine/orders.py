"""From the scheduler's plan to the arrays that the devices take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.engine.generation import Generation
from moe_jax.engine.sizes import Sizes, StepSize
from moe_jax.models import Lines, PageRange, Segment, pack
from moe_jax.programs import PAGE, Asked, Turn
from moe_jax.sampling import Knobs
from moe_jax.scheduler import Chunk, Decodes, Plan, Request, Table
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.rows import on_host

ON_TAPE = -1
"""A token that the devices know and the host may not."""
NOBODY = Knobs.of([None])


@dataclass(frozen=True)
class Order:
    """What every process has its devices do: one step, or several of requests that all decode."""

    turn: Turn
    budgets: Int32[Array, "shards*L"] | None
    """How many tokens each line may give; `None` for one step, in which each that draws gives one."""
    asked: Asked


class Draw(NamedTuple):
    """A line, counted over all token shards, that gives tokens to a request."""

    request: Request
    line: int


class Piece(NamedTuple):
    """Neighbouring rows of a prompt of which something is told."""

    request: Request
    start: int
    """Their first position."""
    rows: slice
    """Counted over all token shards."""


@dataclass(frozen=True)
class Claims:
    """What of a step's results belongs to whom."""

    draws: list[Draw] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


def order(
    plan: Plan,
    sizes: Sizes,
    placement: Placement,
    asked: Asked,
    generation: Callable[[Request], Generation],
    write: type[Writer],
) -> tuple[Order, Claims]:
    """Write down a plan; the claims say whose the results are."""
    writer = write(_size(plan, sizes), sizes, len(plan.decodes), generation)
    for decodes, chunks in zip(plan.decodes, plan.chunks, strict=True):
        writer.shard(decodes, chunks)
    return writer.order(placement, asked), writer.claims


def idle_order(size: StepSize, sizes: Sizes, placement: Placement, asked: Asked, write: type[Writer]) -> Order:
    """A step in which nobody takes part."""
    shards = placement.size(Role.TOKENS)
    writer = write(size, sizes, shards, lambda request: {}[request])
    for _ in range(shards):
        writer.shard(Decodes(), [])
    return writer.order(placement, asked)


def _size(plan: Plan, sizes: Sizes) -> StepSize:
    prompt_rows = max(sum(chunk.end - chunk.start for chunk in chunks) for chunks in plan.chunks)
    decoded = (position + steps for _, position, steps in chain(*plan.decodes))
    computed = (chunk.end for chunk in chain(*plan.chunks))
    return sizes.step(max(map(len, plan.decodes)), prompt_rows, max(chain(decoded, computed)))


class Writer:
    """Writes an order line by line, shard after shard."""

    def __init__(self, size: StepSize, sizes: Sizes, shards: int, generation: Callable[[Request], Generation]) -> None:
        self.claims = Claims()
        self._budgets = np.zeros((shards, size.lines), np.int32)
        self._size, self._generation = size, generation
        self._slots = np.full((shards, size.lines), sizes.slots, np.int32)
        self._draws = np.zeros((shards, size.lines), bool)
        self._knobs = [[NOBODY] * size.prompt_lines for _ in range(shards)]
        self._targets = np.zeros((shards, size.shape.capacity), np.int32)
        self._lines: list[list[Lines]] = []

    def shard(self, decodes: Decodes, chunks: Sequence[Chunk]) -> None:
        """The lines of the next token shard."""
        shard = len(self._lines)
        decoding, prompts = self._decoding(shard, decodes), Lines(len(self._size.windows))
        row = len(decodes) * decodes.width
        for chunk in chunks:
            for start in range(chunk.start, chunk.end, self._size.chunk):
                end = min(start + self._size.chunk, chunk.end)
                prompts.add(self._prompt(shard, len(prompts), row, chunk, start, end))
                row += end - start
        parts = ((self._size.decoding, decoding), (self._size.prompt_lines, prompts))
        self._lines.append([lines for most, lines in parts if most])

    def order(self, placement: Placement, asked: Asked) -> Order:
        """One step where there are prompts, else as many as the lines want."""
        budgets = None if self._size.prompt_lines else on_host(self._budgets.reshape(-1))
        return Order(self._turn(placement), budgets, asked)

    def _turn(self, placement: Placement) -> Turn:
        batch, _ = pack(self._lines, self._size.shape, placement)
        knobs = list(chain(*self._knobs))
        return Turn(
            batch,
            slots=on_host(self._slots.reshape(-1)),
            draws=on_host(self._draws.reshape(-1)),
            knobs=jax.tree.map(lambda *rows: on_host(np.concatenate(rows)), *knobs) if knobs else None,
            targets=on_host(self._targets.reshape(-1)) if self.claims.pieces else None,
        )

    def _decoding(self, shard: int, decodes: Decodes) -> Lines:
        taken = slice(len(decodes))
        self._slots[shard, taken] = [request.slot for request in decodes.requests]
        self._draws[shard, taken], self._budgets[shard, taken] = True, decodes.steps
        self.claims.draws.extend(map(Draw, decodes.requests, count(shard * self._size.lines)))
        return self._on_tape(decodes)

    def _on_tape(self, decodes: Decodes) -> Lines:
        lines = Lines(len(self._size.windows))
        lines.starts.extend(decodes.positions)
        lines.lengths.extend(repeat(decodes.width, len(decodes)))
        lines.tokens.extend(repeat(ON_TAPE, len(decodes) * decodes.width))
        for number, ranges in enumerate(lines.tables):
            ranges += [_seen(request.pages[number], start, start + steps) for request, start, steps in decodes]
        return lines

    def _prompt(self, shard: int, number: int, row: int, chunk: Chunk, start: int, end: int) -> Segment:
        request, line = chunk.request, self._size.decoding + number
        generation = self._generation(request)
        self._slots[shard, line] = request.slot
        self._knobs[shard][number] = generation.knobs
        if chunk.samples and end == chunk.end:
            self._end_prompt(shard, line, request)
        if generation.tells_prompt:
            first = shard * self._size.shape.capacity + row
            self.claims.pieces.append(Piece(request, start, slice(first, first + end - start)))
            following = request.sequence(start + 1, end + 1)
            self._targets[shard, row : row + len(following)] = following
        return Segment(start, request.sequence(start, end), [_seen(table, start, end) for table in request.pages])

    def _end_prompt(self, shard: int, line: int, request: Request) -> None:
        """After the last row of the line, tokens are chosen."""
        self._draws[shard, line] = True
        self.claims.draws.append(Draw(request, shard * self._size.lines + line))


def _seen(table: Table, start: int, end: int) -> PageRange:
    """The pages that positions from `start` up to `end` see."""
    first = table.pool.group.first_page(start, PAGE)
    return PageRange(first * PAGE, table.ids[first - table.first : -(-end // PAGE) - table.first])
