"""Continuous batching: requests come and go between steps, prompts are computed in chunks beside others' decode rows.

A plan may be made before the tokens of those before it are known, so that the device need not wait for the host. What a
request gives up is free at once, for the device runs plans in order: what is written there comes after what was read.

Preemption by recompute is vLLM's (Kwon et al., arXiv:2309.06180), prefill in chunks beside decode Sarathi's (Agrawal et
al., arXiv:2308.16369).
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from operator import attrgetter

from moe_jax.errors import RequestError
from moe_jax.scheduler.limits import Limits
from moe_jax.scheduler.pages import Pages
from moe_jax.scheduler.plan import Chunk, Decodes, Plan
from moe_jax.scheduler.prefix import Node
from moe_jax.scheduler.request import NEW, Request

OVERTAKES = 1000
"""Earlier requests that one step of priority overtakes at most, so that nobody waits forever."""

_order = attrgetter("order")


class Shard:
    """The requests and pages of one token shard."""

    __slots__ = ("free_slots", "number", "pages", "prefilling", "running")

    def __init__(self, number: int, limits: Limits) -> None:
        self.number = number
        self.pages = Pages(limits)
        self.free_slots = list(range(limits.slots))
        """A heap: the lowest is taken first."""
        self.running: list[Request] = []
        """In order; the last is the first to be preempted."""
        self.prefilling: list[Request] = []
        """Those of them whose prompt is not computed yet, in order."""


class Scheduler:
    """Requests wait in one line, by arrival and priority. None but the first is admitted, as soon as its first chunk
    can go into a step of a shard that has a slot and pages for it.

    It keeps its shard until it ends, or is preempted for want of pages by one before it in order. It then waits at its
    old place, for its tokens in flight first of all, and is computed anew from all known tokens.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.preemptions = 0
        self.prefix_hits = 0
        """Positions that admissions took from the prefix cache."""
        self._shards = [Shard(number, limits) for number in range(limits.shards)]
        self._requests: dict[Hashable, Request] = {}
        self._waiting: list[tuple[tuple[int, int], Request]] = []
        """A heap; requests that have ended stay until they come first."""
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(len(shard.running) for shard in self._shards)

    @property
    def waiting(self) -> int:
        """Requests that have none."""
        return len(self._requests) - self.running

    @property
    def used_pages(self) -> list[list[int]]:
        """Of each token shard and group of layers, the pages that running requests hold."""
        return [[pool.used for pool in shard.pages.pools] for shard in self._shards]

    def add(self, request: Request) -> None:
        """Put a new request in line.

        Raises:
          RequestError: its id is that of one that has not ended, or it could not run even alone.
        """
        assert request.order == NEW, "each request is added once"
        if request.id in self._requests:
            raise RequestError(f"there is a request {request.id!r} already: give each its own id")
        limits = self.limits
        for group in limits.groups:
            needed = group.max_pages(request.max_positions, max(limits.chunk, limits.decode_steps), limits.page)
            if needed > group.pages:
                raise RequestError(
                    f"request {request.id!r} needs {needed} pages of {limits.page} positions for its prompt of "
                    f"{len(request.prompt)} and {request.max_tokens} tokens more, but a token shard has "
                    f"{group.pages}: shorten it, or give the cache more memory"
                )
        request.order = (self._arrivals - request.priority * OVERTAKES, self._arrivals)
        self._arrivals += 1
        self._requests[request.id] = request
        heapq.heappush(self._waiting, (request.order, request))

    def finish(self, id: Hashable) -> bool:
        """A request has had its last token, or is no longer wanted: its slot and pages are free, and tokens in flight
        are dropped. Whether there was one: `update_from_output` ends those that had all their tokens.
        """
        request = self._requests.get(id)
        if request is None:
            return False
        self._end(request)
        return True

    def plan(self) -> Plan:
        """The next dispatch."""
        chunks = self._prefill()
        steps = 1 if any(chunks) else self._steps()
        plan = Plan([self._decode(shard, steps) for shard in self._shards], steps, chunks)
        for chunk in chain(*chunks):
            if chunk.samples:
                chunk.request.decode_end = chunk.request.max_positions
        return plan

    def update_from_output(self, plan: Plan, tokens: Mapping[Request, Sequence[int]]) -> None:
        """What the device gave for a plan: of each request as many as planned, or fewer, up to a stop token.

        Those of requests that have ended meanwhile are ignored. Requests with fewer than planned, or as many as they
        may have, end here; the caller ends (`finish`) those that stop otherwise.
        """
        for request, planned in plan.planned_tokens():
            if request.ended:
                continue
            given, all_tokens = tokens[request], request.tokens
            all_tokens += given
            if len(all_tokens) >= request.share_at:
                # A token that stops a request is not fed: only the next one shows that its position was written.
                self._shards[request.shard].pages.share(request, request.known - 1)
            if len(given) < planned or len(all_tokens) >= request.max_tokens:
                self._end(request)

    def rank_shards(
        self, request: Request, shards: Sequence[tuple[Shard, list[Node]]]
    ) -> list[tuple[Shard, list[Node]]]:
        """Shards that have room for a request's first chunk, each with what it shares there, the best first.

        The fewest requests, so that all have as many rows; then the longest beginning that need not be computed; then
        the most pages to be had.
        """

        def rank(place: tuple[Shard, list[Node]]) -> tuple[int, int, int]:
            shard, hit = place
            return len(shard.running), -len(hit), -sum(pool.available for pool in shard.pages.pools)

        return sorted(shards, key=rank)

    def _end(self, request: Request) -> None:
        request.ended = True
        del self._requests[request.id]
        if request.slot >= 0:
            self._vacate(request)

    def _vacate(self, request: Request) -> None:
        shard = self._shards[request.shard]
        shard.running.remove(request)
        if request in shard.prefilling:
            shard.prefilling.remove(request)
        heapq.heappush(shard.free_slots, request.slot)
        shard.pages.release(request)
        request.awaited = request.known + request.pending
        request.shard = request.slot = -1
        request.computed = request.decode_end = request.allocated = 0

    def _preempt(self, request: Request) -> None:
        self._vacate(request)
        self.preemptions += 1
        heapq.heappush(self._waiting, (request.order, request))

    def _extend(self, shard: Shard, request: Request, end: int) -> bool:
        """Have pages for all positions before `end`, if need be those of the last in order. False where that is the
        request itself, which then no longer runs."""
        while not shard.pages.extend(request, end):
            last = shard.running[-1]
            self._preempt(last)
            if last is request:
                return False
        return True

    def _steps(self) -> int:
        """Decode steps that are of use to any request, at most those of a dispatch."""
        most = 1
        for shard in self._shards:
            for request in shard.running:
                left = request.decode_end - request.computed
                if left > most:
                    most = left
                    if most >= self.limits.decode_steps:
                        return self.limits.decode_steps
        return most

    def _decode(self, shard: Shard, steps: int) -> Decodes:
        decodes, extend = Decodes(), shard.pages.extend
        requests, positions, counts = decodes.requests, decodes.positions, decodes.steps
        for request in shard.running:  # those that are preempted on the way stand at its end
            position, last = request.computed, request.decode_end
            if position < last:
                end = position + steps
                if end > last:
                    end = last
                if end > request.allocated and not (extend(request, end) or self._extend(shard, request, end)):
                    break
                request.computed = end
                requests.append(request)
                positions.append(position)
                counts.append(end - position)
        return decodes

    def _prefill(self) -> list[list[Chunk]]:
        """Chunks of prompts that are computed in part already, then of the first in line, as long as there is room."""
        chunks: list[list[Chunk]] = [[] for _ in self._shards]
        if any(shard.prefilling or (self._waiting and shard.free_slots) for shard in self._shards):
            rows = [max(self.limits.rows - self._reserve(shard), self.limits.block) for shard in self._shards]
            for shard, taken in zip(self._shards, chunks, strict=True):
                rows[shard.number] -= self._continue(shard, rows[shard.number], taken)
            while (request := self._first()) and self._admit(request, rows, chunks):
                pass
        return chunks

    def _reserve(self, shard: Shard) -> int:
        """Have pages for one decode step of each request, before prompts take them. How many rows of prompts' these
        are."""
        count = 0
        for request in shard.running:
            if request.computed < request.decode_end:
                if request.computed >= request.allocated and not self._extend(shard, request, request.computed + 1):
                    break
                count += 1
        return count

    def _continue(self, shard: Shard, rows: int, chunks: list[Chunk]) -> int:
        """Add chunks of prompts that are computed in part already. How many rows these are."""
        taken = 0
        for request in shard.prefilling:  # those that are preempted on the way stand at its end
            if taken == rows or len(chunks) == self.limits.chunks:
                break
            end = self._chunk_end(request, rows - taken)
            if end > request.allocated and not self._extend(shard, request, end):
                break
            taken += self._taken(request, end)
            chunks.append(self._chunk(shard, request, end))
        shard.prefilling = [request for request in shard.prefilling if request.computed < request.known]
        return taken

    def _first(self) -> Request | None:
        """The first in line, unless it must wait for its tokens in flight, and all others with it."""
        while self._waiting and self._waiting[0][1].ended:
            heapq.heappop(self._waiting)
        request = self._waiting[0][1] if self._waiting else None
        return request if request and not request.pending else None

    def _admit(self, request: Request, rows: list[int], chunks: list[list[Chunk]]) -> bool:
        """Let the first in line run, with its first chunk, where there is room for it. Whether there was."""
        open_to_it = [
            (shard, shard.pages.match(request))
            for shard in self._shards
            if shard.free_slots and rows[shard.number] and len(chunks[shard.number]) < self.limits.chunks
        ]
        for shard, hit in self.rank_shards(request, open_to_it):
            if shard.pages.fits(request, hit, self._upcoming(shard)):
                break
        else:
            return False
        heapq.heappop(self._waiting)
        request.shard, request.slot = shard.number, heapq.heappop(shard.free_slots)
        insort(shard.running, request, key=_order)
        shard.pages.admit(request, hit)
        self.prefix_hits += request.cached
        end = self._chunk_end(request, rows[shard.number])
        rows[shard.number] -= self._taken(request, end)
        chunks[shard.number].append(self._chunk(shard, request, end))
        if request.computed < request.known:
            insort(shard.prefilling, request, key=_order)
        return True

    def _upcoming(self, shard: Shard) -> list[int]:
        """Pages of each group that running requests will want for this step and the next dispatch."""
        wanted = [0] * len(self.limits.groups)
        for request in shard.running:
            if not request.decode_end and request.computed < request.known:
                end = self._chunk_end(request, self.limits.chunk)
            else:
                end = min(self._next_end(request), request.max_positions)
            if end > request.allocated:
                wanted = [sum(pair) for pair in zip(wanted, shard.pages.missing(request, end), strict=True)]
        return wanted

    def _next_end(self, request: Request) -> int:
        return request.computed + 1 + self.limits.decode_steps

    def _chunk_end(self, request: Request, rows: int) -> int:
        return min(request.computed + min(self.limits.chunk, rows), request.known)

    def _taken(self, request: Request, end: int) -> int:
        """Rows that a chunk up to `end` takes from others: so that each begins with a block, whole ones."""
        return -(-(end - request.computed) // self.limits.block) * self.limits.block

    def _chunk(self, shard: Shard, request: Request, end: int) -> Chunk:
        """The request's positions up to `end`, for which it has pages."""
        chunk = Chunk(request, request.computed, end, samples=end == request.known)
        request.computed = end
        request.awaited = request.known + chunk.samples
        shard.pages.share(request, end // self.limits.block * self.limits.block)
        return chunk
