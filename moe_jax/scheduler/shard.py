"""Scheduling on one token shard: decode steps, prefill chunks, and preemption."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence
from operator import attrgetter

from moe_jax.scheduler.limits import Limits
from moe_jax.scheduler.pages import Pages
from moe_jax.scheduler.plan import Chunk, Decodes
from moe_jax.scheduler.prefix_tree import PrefixNode
from moe_jax.scheduler.request import Request
from moe_jax.scheduler.waiting_queue import MAX_PASSED, WaitingQueue

_order = attrgetter("order")


class TokenShard:
    """Slots, pages and running requests of one token shard.

    Without enough pages, the running request that is last in queue order is preempted: it gives up its slot and pages,
    returns to the waiting queue, and is recomputed later. This is preemption by recomputation as in vLLM (Kwon et al.,
    arXiv:2309.06180).
    """

    def __init__(self, number: int, limits: Limits, waiting: WaitingQueue) -> None:
        self.number = number
        """Index of the token shard."""
        self.limits = limits
        self.pages = Pages(limits)
        self.running: list[Request] = []
        """Running requests, in queue order."""
        self.prefilling: list[Request] = []
        """Running requests in prefill, in queue order."""
        self.preemptions = 0
        """Number of preemptions so far."""
        self._waiting = waiting
        self._free_slots = list(range(limits.slots))
        """Heap of free slots: the lowest is taken first."""

    @property
    def has_free_slot(self) -> bool:
        """True if another request can run."""
        return bool(self._free_slots)

    def prefill_tokens(self, request: Request) -> int:
        """Number of tokens that prefill would compute. Cached pages count for prompts of more than one step only."""
        cached = self.pages.match_prefix(request) if request.known > self.limits.max_rows else ()
        return request.known - len(cached) * self.limits.page

    def start(self, request: Request, prefix: Sequence[PrefixNode]) -> None:
        """Start a request: take a slot and pages."""
        request.shard, request.slot, request.passed = self.number, heapq.heappop(self._free_slots), 0
        insort(self.running, request, key=_order)
        insort(self.prefilling, request, key=_order)
        self.pages.allocate(request, prefix)

    def remove(self, request: Request) -> None:
        """Stop a running request: free its slot and pages, and reset its scheduling state."""
        self.running.remove(request)
        if request in self.prefilling:
            self.prefilling.remove(request)
        heapq.heappush(self._free_slots, request.slot)
        self.pages.free(request)
        request.planned_length = request.known + request.pending
        request.shard = request.slot = -1
        request.computed = request.decode_end = request.allocated = 0

    def useful_steps(self) -> int:
        """Largest number of decode steps that a running request can use, from 1 to the limit of a dispatch."""
        limit, largest = self.limits.decode_steps, 1
        for request in self.running:
            left = request.decode_end - request.computed
            if left > largest:
                largest = left
                if largest >= limit:
                    return limit
        return largest

    def decode(self, steps: int) -> Decodes:
        """Plan decode steps of all running requests that are past prefill."""
        decodes = Decodes()
        requests, positions, counts = decodes.requests, decodes.positions, decodes.steps
        for request in self.running:  # preemption removes requests at the end of the list
            position, last = request.computed, request.decode_end
            if position < last:
                end = position + steps
                if end > last:
                    end = last
                if end > request.allocated and not self.extend(request, end):
                    break
                request.computed = end
                requests.append(request)
                positions.append(position)
                counts.append(end - position)
        return decodes

    def reserve_decode(self) -> int:
        """Allocate pages for one decode step of each request, before prefill takes them.

        Returns the number of decode rows, which prefill cannot use.
        """
        count = 0
        for request in self.running:  # preemption removes requests at the end of the list
            if request.computed < request.decode_end:
                if request.computed >= request.allocated and not self.extend(request, request.computed + 1):
                    break
                count += 1
        return count

    def extend(self, request: Request, end: int) -> bool:
        """Allocate pages for all positions before `end`, preempting the last requests in queue order if necessary.

        Return False if the request itself is preempted.
        """
        while not self.pages.extend(request, end):
            last = self.running[-1]
            self.remove(last)
            self.preemptions += 1
            last.prefill_tokens, last.passed = self.prefill_tokens(last), MAX_PASSED
            self._waiting.push(last)
            if last is request:
                return False
        return True

    def chunk(self, request: Request, end: int) -> Chunk:
        """Plan the positions of a request up to `end`, which have pages."""
        chunk = Chunk(request, request.computed, end, samples=end == request.known)
        request.computed = end
        request.planned_length = request.known + chunk.samples
        self.pages.cache_full_pages(request, end // self.limits.block * self.limits.block)
        return chunk

    def rows(self, chunk: Chunk) -> int:
        """Number of rows that a chunk takes: whole blocks, so that the next chunk begins with a block."""
        return self.limits.whole_blocks(chunk.end - chunk.start)

    def upcoming_pages(self) -> list[int]:
        """Number of pages of each cache group that running requests need for this step and the next dispatch."""
        upcoming = [0] * len(self.limits.groups)
        for request in self.running:
            if not request.decode_end and request.computed < request.known:
                end = min(request.computed + self.limits.max_chunk_tokens, request.known)
            else:
                end = min(self._next_end(request), request.max_positions)
            if end > request.allocated:
                upcoming = [sum(pair) for pair in zip(upcoming, self.pages.missing(request, end), strict=True)]
        return upcoming

    def _next_end(self, request: Request) -> int:
        """Position up to which a request may decode in this step and the next dispatch."""
        return request.computed + 1 + self.limits.decode_steps
