"""Simulation of a scheduler with a toy device, and random limits and requests for it."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import deque
from collections.abc import Mapping

from toy_device import ToyDevice, continuation

from moe_jax.scheduler import CacheGroup, Limits, Plan, Request, Scheduler
from moe_jax.scheduler.prefill import LONGER
from moe_jax.scheduler.waiting_queue import MAX_PASSED

LONGEST = 18
"""Maximum number of cache positions of a random request."""
CHECK_EVERY = 3
"""Number of plans between two checks of the page counts."""


class Simulation:
    """Scheduler and toy device, with the invariants that hold after each plan.

    Args:
      ahead: number of plans made before the tokens of the first of them are known.
      stop: stop token of the device. If it is the last planned token of a request, the host finishes the request.
    """

    def __init__(self, limits: Limits, vocabulary: int = 50, stop: int | None = None, ahead: int = 1) -> None:
        self.scheduler = Scheduler(limits)
        self.limits, self.vocabulary, self.stop, self.ahead = limits, vocabulary, stop, ahead
        self.device = ToyDevice(limits, vocabulary, stop)
        self.in_flight: deque[tuple[Plan, Mapping[Request, list[int]]]] = deque()
        self.requests: list[Request] = []
        self.cancelled: set[Request] = set()
        self.plans = 0

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def cancel(self, request: Request) -> bool:
        self.cancelled.add(request)
        return self.scheduler.finish(request.id)

    def plan(self) -> Plan:
        running = self.running()
        admissible = {r: r.passed for r in self.requests if not r.ended and not r.pending}
        plan = self.scheduler.plan()
        self.plans += 1
        self.check(plan, self.running() - running, admissible)
        if plan:
            self.in_flight.append((plan, self.device.run(plan)))
        return plan

    def update_from_output(self) -> None:
        plan, outputs = self.in_flight.popleft()
        self.scheduler.update_from_output(plan, outputs)
        for request, planned in plan.planned_tokens():
            tokens = outputs[request]
            if len(tokens) == planned and tokens[-1] == self.stop:
                self.scheduler.finish(request.id)

    def step(self) -> Plan:
        plan = self.plan()
        assert plan or self.in_flight or not self.scheduler.has_work, "an idle scheduler with work plans something"
        while len(self.in_flight) > (self.ahead if plan else 0):
            self.update_from_output()
        return plan

    def run(self) -> None:
        while self.scheduler.has_work or self.in_flight:
            self.step()
            assert self.plans < 100_000

    def finish(self) -> None:
        self.run()
        self.check_end()

    def running(self) -> set[Request]:
        return {request for request in self.requests if request.slot >= 0}

    def check(self, plan: Plan, admitted: set[Request], admissible: Mapping[Request, int]) -> None:
        """Check a plan.

        Args:
          plan: the plan.
          admitted: requests that it admits.
          admissible: requests that it may admit, each with the number of requests that have passed it.
        """
        limits, running = self.limits, self.running()
        waiting = [request for request in self.requests if not request.ended and request.slot < 0]
        assert (self.scheduler.running, self.scheduler.waiting) == (len(running), len(waiting))
        assert admitted <= admissible.keys(), "no request is admitted while it has pending tokens"
        last = max((request.order for request in admitted), default=(0, 0))
        for request in waiting if admitted else ():
            assert request.order > last or self.may_be_overtaken(request, plan, admissible), "queue order"
        assert plan.steps == 1 or not any(plan.chunks)
        for shard, (decodes, chunks) in enumerate(zip(plan.decodes, plan.chunks, strict=True)):
            on_shard = [request for request in running if request.shard == shard]
            assert sorted({r.slot for r in on_shard}) == sorted(r.slot for r in on_shard)
            assert len(on_shard) <= limits.slots
            assert len(chunks) <= limits.max_prefills
            assert plan.rows[shard] <= max(limits.max_rows, limits.slots)
            assert all(chunk.end - chunk.start <= limits.max_chunk_tokens for chunk in chunks)
            assert all(request.passed <= MAX_PASSED for request in waiting)
            planned = [*decodes.requests, *(chunk.request for chunk in chunks)]
            assert len(planned) == len(set(planned))
            if on_shard:
                first = min(on_shard, key=lambda request: request.order)
                all_planned = first.pending + len(first.tokens) == first.max_tokens
                assert first in planned or all_planned, "the first request of a shard is in every plan"
        if self.plans % CHECK_EVERY == 0:
            self.check_pages()

    def may_be_overtaken(self, request: Request, plan: Plan, passed: Mapping[Request, int]) -> bool:
        """True if a request lacks pages or waits for a long prompt, or is behind a request of its length that does."""
        earlier = [r for r in self.requests if not r.ended and r.slot < 0 and r.order <= request.order]
        unfinished = [chunk for chunk in itertools.chain(*plan.chunks) if not chunk.samples]
        return any(r.passed > passed.get(r, r.passed) for r in earlier) or any(
            chunk.request.order < request.order and chunk.request.known - chunk.start < LONGER**2 * request.known
            for chunk in unfinished
        )

    def check_pages(self) -> None:
        """Check that each page is free, evictable or referenced, and that reference counts match the page tables."""
        for shard in self.scheduler._shards:
            for number, pool in enumerate(shard.pages.pools):
                ref_counts = [0] * pool.group.pages
                for request in shard.running:
                    table = request.pages[number]
                    assert (table.first + len(table.ids)) * self.limits.page >= request.computed
                    for page in table.ids:
                        ref_counts[page] += 1
                assert ref_counts == pool.ref_counts
                unreferenced = [page for page, count in enumerate(ref_counts) if not count]
                assert sorted([*pool._free_list, *pool._evictable]) == unreferenced

    def check_end(self) -> None:
        assert self.scheduler.running == self.scheduler.waiting == 0
        assert not any(itertools.chain(*self.scheduler.used_pages))
        for request in self.requests:
            expected = continuation(request.prompt, request.max_tokens, self.vocabulary, self.stop)
            assert request.tokens == (expected[: len(request.tokens)] if request in self.cancelled else expected)
        for shard in self.scheduler._shards:
            for pool in shard.pages.pools:
                assert pool.allocate(pool.group.pages, array("i"))
            assert not shard.pages._root.children, "the prefix tree has no node without a page"


def random_limits(rng: random.Random, page: int) -> Limits:
    windows = rng.choice([[None], [None], [None, 1], [None, 2 * page], [None, rng.randint(1, 9)], [rng.randint(1, 9)]])
    chunk, decode_steps = rng.randint(1, 9), rng.choice([1, 1, 2, 5])
    extra = rng.choice([0, 0, 3, 30])
    needed = {window: CacheGroup(1, window).max_pages(LONGEST, max(chunk, decode_steps), page) for window in windows}
    return Limits(
        shards=rng.choice([1, 1, 2, 3]),
        slots=rng.randint(1, 4),
        page=page,
        groups=tuple(CacheGroup(needed[window] + rng.randint(0, extra), window) for window in windows),
        max_chunk_tokens=chunk,
        max_prefills=rng.randint(1, 3),
        max_rows=rng.randint(1, 12),
        decode_steps=decode_steps,
        prefix_cache=rng.random() < 0.8,
    )


def random_request(rng: random.Random, simulation: Simulation, roots: list[list[int]]) -> Request:
    """Random request whose prompt continues a root, or an ended request."""
    number, vocabulary = len(simulation.requests), simulation.vocabulary
    ended = [[*r.prompt, *r.tokens] for r in simulation.requests if r.ended and r.known <= 12]
    prefix = rng.choice(ended) if ended and rng.random() < 0.4 else rng.choice(roots)[: rng.randint(0, 10)]
    prompt = [*prefix, *(rng.randrange(vocabulary) for _ in range(rng.choice([1, 1, rng.randint(1, 4)])))]
    max_tokens = min(rng.choice([1, rng.randint(1, 10), 10]), LONGEST + 1 - len(prompt))
    return Request(number, prompt, max_tokens, rng.choice([0, 0, 0, 1]), shares_prefix=rng.random() < 0.9)
