"""Scheduling of block-diffusion models: tokens come in blocks, after a number of steps that only the devices know.

A plan therefore bounds how far a request may decode, not where it is. The request continues from its own position, as
far as it has pages, and is planned again until all its tokens are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from moe_jax.scheduler.plan import Decodes, Plan
from moe_jax.scheduler.request import Request
from moe_jax.scheduler.scheduler import Scheduler
from moe_jax.scheduler.shard import TokenShard

MAX_AHEAD = 64
"""Maximum number of positions to allocate ahead for a request in each dispatch, but at least one block.

Other requests could use the pages that a request does not reach.
"""


@dataclass(eq=False, repr=False, slots=True)
class DiffusionRequest(Request):
    """Request that is decoded in blocks. All its tokens have positions in the cache, the last ones included."""

    block: int = field(kw_only=True)
    """Number of positions in a block."""
    in_flight: int = field(default=0, init=False)
    """Number of dispatches in flight that may generate tokens of the request."""

    @property
    def pending(self) -> int:
        """Number of dispatches in flight: a preempted request waits for all of them."""
        return self.in_flight

    @property
    def max_positions(self) -> int:
        """Maximum number of cache positions of the request, in whole blocks."""
        return -(-(len(self.prompt) + self.max_tokens) // self.block) * self.block


class DiffusionShard(TokenShard):
    """Slots, pages and running diffusion requests of one token shard."""

    def useful_steps(self) -> int:
        """Number of decode steps of a dispatch: the host does not know how many a request can use."""
        return self.limits.decode_steps

    def decode(self, steps: int) -> Decodes:
        """Plan decode steps of all running requests that are past prefill.

        In the result, `positions` are the starts of the first blocks that may be unknown, and `steps` are the numbers
        of positions from there that have pages.
        """
        block = self.limits.block
        decodes, ahead = Decodes(block), block * max(min(steps // 2 + 1, MAX_AHEAD // block), 1)
        for request in self.running:  # preemption removes requests at the end of the list
            assert isinstance(request, DiffusionRequest)
            if not request.decode_end:
                continue
            if not self._allocate_block(request):
                break
            start = request.computed // block * block
            end = min(start + ahead * (request.in_flight + 1), request.decode_end)
            if end > request.allocated:
                self.pages.extend(request, end)
            decodes.requests.append(request)
            decodes.positions.append(start)
            decodes.steps.append(min(end, request.allocated // block * block) - start)
            request.in_flight += 1
        return decodes

    def reserve_decode(self) -> int:
        """Allocate pages for one block of each decoding request, before prefill takes them.

        Returns 0: rows of blocks do not reduce those of prompts.
        """
        for request in self.running:  # preemption removes requests at the end of the list
            if request.decode_end and not self._allocate_block(request):
                break
        return 0

    def _allocate_block(self, request: Request) -> bool:
        """Allocate pages for the first unknown block. Return False if the request itself is preempted."""
        end = min(self._next_end(request), request.decode_end)
        return end <= request.allocated or self.extend(request, end)

    def _next_end(self, request: Request) -> int:
        """End of the first unknown block."""
        return (request.computed // self.limits.block + 1) * self.limits.block


class DiffusionScheduler(Scheduler):
    """Scheduler of diffusion requests.

    Prefill computes a prompt to its end, so that the devices know its last tokens, and samples nothing. If the prompt
    ends within a block, the first decoded block computes the tokens of that block again.
    """

    shard_type = DiffusionShard

    def update_from_output(self, plan: Plan, tokens: Mapping[Request, Sequence[int]]) -> None:
        """Record the tokens that the devices generated for a plan: any number of blocks for each request, or none.

        A request with `max_tokens` ends here. The caller finishes requests that stop for another reason (`finish`).
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
                # The tokens of the last block are known, but only the next block shows that the last one was written.
                self._shards[request.shard].pages.cache_full_pages(request, (request.known // block - 1) * block)
            if len(request.tokens) >= request.max_tokens:
                self._end(request)
