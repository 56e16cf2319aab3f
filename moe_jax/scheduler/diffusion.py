"""Requests whose tokens come in blocks, each after a number of steps that only the device knows.

What is planned is therefore no position but an end: a dispatch takes a request on from wherever it has come to, as far
as there are pages. It is planned again until its tokens are known to be all there.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain

from moe_jax.scheduler.plan import Decodes, Plan
from moe_jax.scheduler.request import Request
from moe_jax.scheduler.scheduler import Scheduler, Shard

AHEAD = 64
"""Positions that a request gets pages for in each dispatch, at most, though for a block at least: pages that it may not
need are others' to have."""


class DiffusionRequest(Request):
    """A request that is decoded in blocks. Its last tokens, too, have positions in the cache."""

    __slots__ = ("block", "in_flight")

    def __init__(
        self,
        id: Hashable,
        prompt: Sequence[int],
        max_tokens: int,
        priority: int = 0,
        shares_prefix: bool = True,
        *,
        block: int,
    ) -> None:
        super().__init__(id, prompt, max_tokens, priority, shares_prefix)
        self.block = block
        self.in_flight = 0
        """Dispatches that may give it tokens, not known yet."""

    @property
    def pending(self) -> int:
        return self.in_flight

    @property
    def max_positions(self) -> int:
        return -(-(len(self.prompt) + self.max_tokens) // self.block) * self.block


class DiffusionScheduler(Scheduler):
    """Scheduler of `DiffusionRequest`s. Prompts are computed to their end, so that the device knows their last tokens;
    the first block to decode is then computed again from those of them that lie in it.

    A chunk gives no token. In a plan's `Decodes`, `positions` are those from which on tokens are not known, or may not
    be, and `steps` the positions from there for which there are pages.
    """

    def update_from_output(self, plan: Plan, tokens: Mapping[Request, Sequence[int]]) -> None:
        """What the device gave for a plan, of each request any number of blocks, or none.

        Requests with as many as they may have end here; the caller ends (`finish`) those that stop otherwise.
        """
        block = self.limits.block
        for request in chain.from_iterable(decodes.requests for decodes in plan.decodes):
            assert isinstance(request, DiffusionRequest)
            request.in_flight -= 1
            if request.ended or not tokens[request]:
                continue
            request.tokens += tokens[request]
            if request.slot >= 0:
                request.computed = request.known
                # The last block is known to be chosen; that it was written, only the next one shows.
                self._shards[request.shard].pages.share(request, (request.known // block - 1) * block)
            if len(request.tokens) >= request.max_tokens:
                self._end(request)

    def _steps(self) -> int:
        return self.limits.decode_steps

    def _decode(self, shard: Shard, steps: int) -> Decodes:
        block = self.limits.block
        decodes, most = Decodes(block), block * max(min(steps // 2 + 1, AHEAD // block), 1)
        for request in shard.running:  # those that are preempted on the way stand at its end
            assert isinstance(request, DiffusionRequest)
            if not request.decode_end:
                continue
            if not self._has_block(shard, request):
                break
            start = request.computed // block * block
            end = min(start + most * (request.in_flight + 1), request.decode_end)
            if end > request.allocated:
                shard.pages.extend(request, end)
            decodes.requests.append(request)
            decodes.positions.append(start)
            decodes.steps.append(min(end, request.allocated // block * block) - start)
            request.in_flight += 1
        return decodes

    def _reserve(self, shard: Shard) -> int:
        """Have pages for a block of each request; their rows are none of the prompts'."""
        for request in shard.running:
            if request.decode_end and not self._has_block(shard, request):
                break
        return 0

    def _has_block(self, shard: Shard, request: Request) -> bool:
        end = min(self._next_end(request), request.decode_end)
        return end <= request.allocated or self._extend(shard, request, end)

    def _next_end(self, request: Request) -> int:
        """The end of the first block that is not known."""
        return (request.computed // self.limits.block + 1) * self.limits.block
