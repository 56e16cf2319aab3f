"""Continuous batching with chunked prefill: requests join and leave between steps, prompts share steps with decoding.

A plan may be made before the tokens of earlier plans are known, so the devices need not wait for the host. Slots and
pages that a request gives up are free at once: the devices run plans in order, so a new owner writes after the old one
has read.

Chunked prefill in the steps of other requests' decoding is Sarathi's (Agrawal et al., arXiv:2308.16369).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from itertools import chain

from moe_jax.errors import RequestError
from moe_jax.scheduler.limits import Limits
from moe_jax.scheduler.plan import Chunk, Plan
from moe_jax.scheduler.prefill import PrefillBatch
from moe_jax.scheduler.prefix_tree import PrefixNode
from moe_jax.scheduler.request import Request
from moe_jax.scheduler.shard import TokenShard
from moe_jax.scheduler.waiting_queue import Admission, WaitingQueue


class Scheduler:
    """Scheduler of all token shards.

    Requests wait in one queue, by arrival and priority. A request is admitted as soon as a token shard has a slot,
    pages, and room for its first chunk in the step. Later requests may be admitted before it while it lacks pages
    (`WaitingQueue`), or if they are much shorter than the prompts that it waits for (`PrefillBatch`).

    A request stays on its token shard until it ends or is preempted. A preempted request returns to its old place in
    the queue, waits for its pending tokens, and is recomputed from all known tokens.
    """

    shard_type: type[TokenShard] = TokenShard
    """Class of the token shards."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.prefix_hits = 0
        """Number of positions that admitted requests took from the prefix cache."""
        self._waiting = WaitingQueue()
        self._shards = [self.shard_type(number, limits, self._waiting) for number in range(limits.shards)]
        self._requests: dict[Hashable, Request] = {}
        """Requests that have not ended."""

    @property
    def has_work(self) -> bool:
        """True if any request has not ended."""
        return bool(self._requests)

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return sum(len(shard.running) for shard in self._shards)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._requests) - self.running

    @property
    def preemptions(self) -> int:
        """Number of preemptions so far."""
        return sum(shard.preemptions for shard in self._shards)

    @property
    def used_pages(self) -> list[list[int]]:
        """Number of pages that running requests hold, for each token shard and cache group."""
        return [[pool.used for pool in shard.pages.pools] for shard in self._shards]

    def add(self, request: Request) -> None:
        """Add a new request to the waiting queue.

        Raises:
          RequestError: another request of the same id has not ended, or the request needs more pages than a token shard
            has.
        """
        if request.id in self._requests:
            raise RequestError(f"there is a request {request.id!r} already: give each request its own id")
        self._check_pages(request)
        request.prefill_tokens = min(shard.prefill_tokens(request) for shard in self._shards)
        self._waiting.add(request)
        self._requests[request.id] = request

    def finish(self, id: Hashable) -> bool:
        """Finish or cancel a request: free its slot and pages, and drop its pending tokens.

        Returns False if there is no such request; `update_from_output` has finished requests that reached `max_tokens`.
        """
        request = self._requests.get(id)
        if request is None:
            return False
        self._end(request)
        return True

    def plan(self) -> Plan:
        """Plan the next dispatch."""
        chunks = self._prefill()
        steps = 1 if any(chunks) else max(shard.useful_steps() for shard in self._shards)
        plan = Plan([shard.decode(steps) for shard in self._shards], steps, chunks)
        for chunk in chain(*chunks):
            if chunk.samples:
                chunk.request.decode_end = chunk.request.max_positions
        return plan

    def update_from_output(self, plan: Plan, tokens: Mapping[Request, Sequence[int]]) -> None:
        """Record the tokens that the devices generated for a plan.

        A request with fewer tokens than planned has met a stop token; it ends here, as does one with `max_tokens`. The
        caller finishes requests that stop for another reason (`finish`). Tokens of requests that ended in the meantime
        are ignored.
        """
        for request, planned in plan.planned_tokens():
            if request.ended:
                continue
            new_tokens, all_tokens = tokens[request], request.tokens
            all_tokens += new_tokens
            if len(all_tokens) >= request.cache_next_at:
                # A stop token is never fed: only the next token shows that the position of the last one was written.
                self._shards[request.shard].pages.cache_full_pages(request, request.known - 1)
            if len(new_tokens) < planned or len(all_tokens) >= request.max_tokens:
                self._end(request)

    def rank_shards(
        self, request: Request, shards: Sequence[tuple[TokenShard, list[PrefixNode]]]
    ) -> list[tuple[TokenShard, list[PrefixNode]]]:
        """Order the token shards that can take a request, each with the prefix that it has cached, best first.

        The best has the fewest running requests, which balances rows; then the longest cached prefix; then the most
        available pages.
        """

        def rank(candidate: tuple[TokenShard, list[PrefixNode]]) -> tuple[int, int, int]:
            shard, prefix = candidate
            return len(shard.running), -len(prefix), -sum(pool.available for pool in shard.pages.pools)

        return sorted(shards, key=rank)

    def _check_pages(self, request: Request) -> None:
        """Raise a RequestError if a request needs more pages than a token shard has."""
        limits = self.limits
        rows = max(limits.max_chunk_tokens, limits.decode_steps)
        needed = [group.max_pages(request.max_positions, rows, limits.page) for group in limits.groups]
        pairs = zip(limits.groups, needed, strict=True)
        lacking = [(group.pages, count) for group, count in pairs if count > group.pages]
        if lacking:
            pages, count = min(lacking)
            raise RequestError(
                f"request {request.id!r} needs {count} pages of {limits.page} positions for its "
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} new tokens, but a token shard has "
                f"{pages}: shorten the prompt or lower max_tokens, to at most "
                f"{pages * limits.page // limits.block * limits.block} tokens together, or give the cache more memory"
            )

    def _end(self, request: Request) -> None:
        request.ended = True
        del self._requests[request.id]
        if request.slot >= 0:
            self._shards[request.shard].remove(request)

    def _prefill(self) -> list[list[Chunk]]:
        """Plan chunks of the requests in prefill, admit waiting requests while there is room, and fill the rows."""
        if not any(shard.prefilling or (self._waiting and shard.has_free_slot) for shard in self._shards):
            return [[] for _ in self._shards]
        rows = [max(self.limits.max_rows - shard.reserve_decode(), self.limits.block) for shard in self._shards]
        batches = [PrefillBatch(shard, limit) for shard, limit in zip(self._shards, rows, strict=True)]
        for batch in batches:
            batch.continue_prompts()
        self._waiting.admit(partial(self._admit, batches))
        return [batch.finish() for batch in batches]

    def _admit(self, batches: Sequence[PrefillBatch], request: Request) -> Admission:
        """Attempt to admit a waiting request, with its first chunk.

        Args:
          batches: prefill of each token shard; that of the chosen one gets the chunk.
          request: the request.
        """
        if not any(batch.has_room for batch in batches):
            return Admission.NO_ROOM
        candidates: list[tuple[TokenShard, list[PrefixNode]]] = []
        lengths: list[int] = []
        for batch in batches:
            if not batch.has_room or batch.must_wait(request, request.prefill_tokens):
                continue
            prefix = batch.shard.pages.match_prefix(request)
            lengths.append(request.known - len(prefix) * self.limits.page)
            if not batch.must_wait(request, lengths[-1]):
                candidates.append((batch.shard, prefix))
        for shard, prefix in self.rank_shards(request, candidates):
            if shard.pages.can_allocate(request, prefix, shard.upcoming_pages()):
                batches[shard.number].admit(request, prefix)
                self.prefix_hits += request.cached
                return Admission.ADMITTED
        if candidates:
            return Admission.NO_PAGES
        request.prefill_tokens = min(lengths, default=request.prefill_tokens)
        return Admission.MUST_WAIT
