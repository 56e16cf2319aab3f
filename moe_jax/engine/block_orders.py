"""From plans of requests that are decoded in blocks to the arrays that the devices take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.engine.generation import Generation
from moe_jax.engine.orders import Draw, Order, Writer
from moe_jax.engine.sizes import Sizes, StepSize
from moe_jax.models import Lines, Segment
from moe_jax.programs import Asked, BlockTurn, Pace
from moe_jax.scheduler import Chunk, Decodes, Request
from moe_jax.sharding import Placement
from moe_jax.sharding.rows import on_host

NOTHING = Pace.of(1, 1, 0)


@dataclass(frozen=True)
class BlockOrder(Order):
    """The budgets of blocks are positions: up to which each has pages."""

    turn: BlockTurn
    budgets: Int32[Array, "shards*D"]
    most: int
    """Steps."""


class BlockWriter(Writer):
    """Writes an order line by line. Where a line of a block is, the devices know; what the plan says is what they must
    have pages for."""

    def __init__(self, size: StepSize, sizes: Sizes, shards: int, generation: Callable[[Request], Generation]) -> None:
        super().__init__(size, sizes, shards, generation)
        self._most = 1 if size.prompt_lines else sizes.decode_steps
        self._limits = np.zeros((shards, size.decoding), np.int32)
        self._paces = [[NOTHING] * size.prompt_lines for _ in range(shards)]

    def order(self, placement: Placement, asked: Asked) -> Order:
        return BlockOrder(self._turn(placement), on_host(self._limits.reshape(-1)), asked, self._most)

    def _turn(self, placement: Placement) -> BlockTurn:
        paces = list(chain(*self._paces))
        pace = jax.tree.map(lambda *rows: on_host(np.concatenate(rows)), *paces) if paces else None
        return BlockTurn(**vars(super()._turn(placement)), pace=pace)

    def _decoding(self, shard: int, decodes: Decodes) -> Lines:
        lines = slice(len(decodes))
        self._slots[shard, lines] = [request.slot for request in decodes.requests]
        self._limits[shard, lines] = np.add(decodes.positions, decodes.steps)
        self.claims.draws.extend(map(Draw, decodes.requests, count(shard * self._size.decoding)))
        return self._on_tape(decodes)

    def _end_prompt(self, shard: int, line: int, request: Request) -> None:
        """From the next step on."""
        self._draws[shard, line] = True

    def _prompt(self, shard: int, number: int, row: int, chunk: Chunk, start: int, end: int) -> Segment:
        self._paces[shard][number] = self._generation(chunk.request).pace
        return super()._prompt(shard, number, row, chunk, start, end)
