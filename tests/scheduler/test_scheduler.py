"""The scheduler with a device that finds every wrong page, in thousands of random workloads."""

from __future__ import annotations

import itertools
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_device import Device, continuation

from moe_jax.errors import ConfigError, RequestError
from moe_jax.scheduler import CacheGroup, Limits, Plan, Request, Scheduler

WORKLOADS, BATCH = 10_000, 2_000
LONGEST = 18
"""Positions that a request of a random workload can come to fill."""


CHECK = 3
"""Pages are counted after every so many plans."""


class Serving:
    """A scheduler and its device, with what must hold after each plan.

    Args:
      ahead: plans that are made before the tokens of the first of them are known.
      stop: the token at which the device stops. Where it is the last that was planned, the host ends the request.
    """

    def __init__(self, limits: Limits, vocabulary: int = 50, stop: int | None = None, ahead: int = 1) -> None:
        self.scheduler = Scheduler(limits)
        self.limits, self.vocabulary, self.stop, self.ahead = limits, vocabulary, stop, ahead
        self.device = Device(limits, vocabulary, stop)
        self.flight: deque[tuple[Plan, Mapping[Request, list[int]]]] = deque()
        self.requests: list[Request] = []
        self.whole: set[Request] = set()
        """Those that nobody cut short."""
        self.plans = 0

    def add(self, request: Request) -> Request:
        self.scheduler.add(request)
        self.requests.append(request)
        self.whole.add(request)
        return request

    def cut(self, request: Request) -> None:
        self.scheduler.finish(request.id)
        self.whole.discard(request)

    def plan(self) -> Plan:
        before = self.running()
        free = {request for request in self.requests if not request.ended and not request.pending}
        plan = self.scheduler.plan()
        self.plans += 1
        self.check(plan, self.running() - before, free)
        if plan:
            self.flight.append((plan, self.device.run(plan)))
        return plan

    def land(self) -> None:
        plan, given = self.flight.popleft()
        self.scheduler.update_from_output(plan, given)
        for request, planned in plan.planned_tokens():
            tokens = given[request]
            if len(tokens) == planned and tokens[-1] == self.stop:
                self.scheduler.finish(request.id)

    def step(self) -> Plan:
        plan = self.plan()
        assert plan or self.flight or not self.scheduler.has_work, "where nothing is in flight, something can be done"
        while len(self.flight) > (self.ahead if plan else 0):
            self.land()
        return plan

    def run(self) -> None:
        while self.scheduler.has_work or self.flight:
            self.step()
            assert self.plans < 100_000

    def finish(self) -> None:
        self.run()
        self.check_end()

    def running(self) -> set[Request]:
        return {request for request in self.requests if request.slot >= 0}

    def check(self, plan: Plan, admitted: set[Request], free: set[Request]) -> None:
        limits, running = self.limits, self.running()
        waiting = [request for request in self.requests if not request.ended and request.slot < 0]
        assert (self.scheduler.running, self.scheduler.waiting) == (len(running), len(waiting))
        assert admitted <= free, "none is admitted while tokens of it are in flight"
        if admitted and waiting:
            assert max(r.order for r in admitted) < min(r.order for r in waiting), "all are admitted in order"
        assert plan.steps == 1 or not any(plan.chunks)
        for shard, (decodes, chunks) in enumerate(zip(plan.decodes, plan.chunks, strict=True)):
            here = [request for request in running if request.shard == shard]
            assert sorted({r.slot for r in here}) == sorted(r.slot for r in here)
            assert len(here) <= limits.slots
            assert len(chunks) <= limits.chunks
            assert plan.rows[shard] <= max(limits.rows, limits.slots)
            assert all(chunk.end - chunk.start <= limits.chunk for chunk in chunks)
            planned = [*decodes.requests, *(chunk.request for chunk in chunks)]
            assert len(planned) == len(set(planned))
            if here:
                first = min(here, key=lambda request: request.order)
                all_planned = first.pending + len(first.tokens) == first.max_tokens
                assert first in planned or all_planned, "the first of a shard always goes on"
        if self.plans % CHECK == 0:
            self.check_pages()

    def check_pages(self) -> None:
        """Each page is free, idle or held, and as often held as tables name it."""
        for shard in self.scheduler._shards:
            for number, pool in enumerate(shard.pages.pools):
                held = [0] * pool.group.pages
                for request in shard.running:
                    table = request.pages[number]
                    assert (table.first + len(table.ids)) * self.limits.page >= request.computed
                    for page in table.ids:
                        held[page] += 1
                assert held == pool.references
                unheld = [page for page, holds in enumerate(held) if not holds]
                assert sorted([*pool._free, *pool._idle]) == unheld

    def check_end(self) -> None:
        assert self.scheduler.running == self.scheduler.waiting == 0
        assert not any(itertools.chain(*self.scheduler.used_pages))
        for request in self.requests:
            right = continuation(request.prompt, request.max_tokens, self.vocabulary, self.stop)
            assert request.tokens == (right if request in self.whole else right[: len(request.tokens)])
        for shard in self.scheduler._shards:
            for pool in shard.pages.pools:
                assert pool.take(pool.group.pages, array("i"))
            assert not shard.pages._root.children, "no page, no node"


def random_limits(draw: random.Random, page: int) -> Limits:
    windows = draw.choice(
        [[None], [None], [None, 1], [None, 2 * page], [None, draw.randint(1, 9)], [draw.randint(1, 9)]]
    )
    chunk, decode_steps = draw.randint(1, 9), draw.choice([1, 1, 2, 5])
    spare = draw.choice([0, 0, 3, 30])
    most = {window: CacheGroup(1, window).max_pages(LONGEST, max(chunk, decode_steps), page) for window in windows}
    return Limits(
        shards=draw.choice([1, 1, 2, 3]),
        slots=draw.randint(1, 4),
        page=page,
        groups=tuple(CacheGroup(most[window] + draw.randint(0, spare), window) for window in windows),
        chunk=chunk,
        chunks=draw.randint(1, 3),
        rows=draw.randint(1, 12),
        decode_steps=decode_steps,
        prefix_cache=draw.random() < 0.8,
    )


def random_request(draw: random.Random, serving: Serving, roots: list[list[int]]) -> Request:
    """It begins as others do, or goes on where one has ended."""
    number, random_token = len(serving.requests), lambda: draw.randrange(serving.vocabulary)
    ended = [[*r.prompt, *r.tokens] for r in serving.requests if r.ended and r.known <= 12]
    root = draw.choice(ended) if ended and draw.random() < 0.4 else draw.choice(roots)[: draw.randint(0, 10)]
    prompt = [*root, *(random_token() for _ in range(draw.choice([1, 1, draw.randint(1, 4)])))]
    most = draw.choice([1, draw.randint(1, 10), 10])
    most = min(most, LONGEST + 1 - len(prompt))
    return Request(number, prompt, most, draw.choice([0, 0, 0, 1]), shares_prefix=draw.random() < 0.9)


def random_workload(seed: int) -> Serving:
    """Requests that arrive, stop, are cancelled, and share beginnings, on too few pages."""
    draw = random.Random(seed)
    vocabulary = draw.choice([3, 10, 50])
    limits = random_limits(draw, draw.choice([1, 2, 3, 4]))
    serving = Serving(limits, vocabulary, draw.choice([None, 0]), ahead=draw.choice([0, 1, 1, 1, 2]))
    roots = [[draw.randrange(vocabulary) for _ in range(10)] for _ in range(2)]
    arrivals = sorted(draw.randint(0, 12) for _ in range(draw.randint(1, 7)))
    for arrival in arrivals:
        while serving.plans < arrival and serving.scheduler.has_work:
            serving.step()
        if serving.requests and draw.random() < 0.1:
            serving.cut(draw.choice(serving.requests))
        serving.add(random_request(draw, serving, roots))
    serving.finish()
    work = sum(len(request.prompt) + request.max_tokens + 2 for request in serving.requests)
    assert serving.plans <= arrivals[-1] + 2 * work, "each plan takes the first in line further"
    return serving


@pytest.mark.parametrize("first", range(0, WORKLOADS, BATCH))
def test_random_workloads_end_with_the_right_tokens_and_all_pages_back(first: int) -> None:
    began, totals = time.perf_counter(), Counter[str]()
    for seed in range(first, first + BATCH):
        try:
            serving = random_workload(seed)
        except AssertionError as error:
            raise AssertionError(f"workload {seed}: {error}") from error
        totals["requests"] += len(serving.requests)
        totals["cut short"] += len(serving.requests) - len(serving.whole)
        totals["plans"] += serving.plans
        totals["tokens"] += sum(len(request.tokens) for request in serving.requests)
        totals["preemptions"] += serving.scheduler.preemptions
        totals["positions shared"] += serving.scheduler.prefix_hits
    print(f"{BATCH} workloads in {time.perf_counter() - began:.1f} s: {dict(totals)}")
    assert min(totals.values()) > BATCH // 100, "each of these was tried"


class AnyOrder(RuleBasedStateMachine):
    """Calls in any order that a caller may choose, with any number of plans in flight."""

    @initialize(seed=st.integers(0, 2**32), page=st.integers(1, 4))
    def begin(self, seed: int, page: int) -> None:
        self.draw = random.Random(seed)
        self.serving = Serving(random_limits(self.draw, page), self.draw.choice([3, 20]), self.draw.choice([None, 0]))
        self.roots = [[self.draw.randrange(self.serving.vocabulary) for _ in range(10)]]

    @rule()
    def add(self) -> None:
        self.serving.add(random_request(self.draw, self.serving, self.roots))

    @rule()
    def plan(self) -> None:
        self.serving.plan()

    @precondition(lambda self: self.serving.flight)
    @rule()
    def land(self) -> None:
        self.serving.land()

    @precondition(lambda self: self.serving.requests)
    @rule(number=st.integers(0, 1000))
    def cancel(self, number: int) -> None:
        request = self.serving.requests[number % len(self.serving.requests)]
        running = not request.ended
        if running:
            self.serving.whole.discard(request)
        assert self.serving.scheduler.finish(request.id) == running
        assert request.ended

    @invariant()
    def pages_are_counted(self) -> None:
        if hasattr(self, "serving"):
            self.serving.check_pages()

    def teardown(self) -> None:
        if hasattr(self, "serving"):
            self.serving.finish()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def limits(**changed: Any) -> Limits:
    small: dict[str, Any] = {
        "shards": 1, "slots": 4, "page": 4, "groups": (CacheGroup(16, None),), "chunk": 8, "chunks": 2, "rows": 16,
        "decode_steps": 1, "prefix_cache": True,
    }  # fmt: skip
    return Limits(**small | changed)


def test_a_beginning_is_shared_in_the_step_that_computes_it_and_the_last_token_always_computed() -> None:
    serving = Serving(limits())
    first, second = (serving.add(Request(name, range(8), 3)) for name in "ab")
    (chunks,) = serving.step().chunks
    assert [(chunk.request, chunk.start, chunk.end) for chunk in chunks] == [(first, 0, 8), (second, 4, 8)]
    assert first.pages[0].ids[0] == second.pages[0].ids[0]
    serving.finish()
    assert serving.scheduler.prefix_hits == second.cached == 4


def test_who_does_not_share_neither_reads_nor_feeds() -> None:
    serving = Serving(limits())
    for name, shares in (("a", False), ("b", True), ("c", False), ("d", True)):
        serving.add(Request(name, range(9), 1, shares_prefix=shares))
        serving.finish() if name == "d" else serving.step()
    assert [request.cached for request in serving.requests] == [0, 0, 0, 8]


def test_generated_pages_are_shared_once_the_next_token_is_known() -> None:
    serving = Serving(limits())
    first = serving.add(Request("a", [1, 2, 3], 6))
    serving.run()
    answer = [*first.prompt, *first.tokens]
    assert len(answer) == 9
    again = serving.add(Request("b", [*answer, 0], 1))
    serving.finish()
    assert again.cached == 8


def test_what_was_not_used_for_longest_goes_first_children_before_parents() -> None:
    serving = Serving(limits(groups=(CacheGroup(6, None),), slots=1))
    for name, prompt in enumerate(([1] * 9, [2] * 9, [1] * 9, [3] * 9)):
        serving.add(Request(name, prompt, 1))
    serving.run()
    pages = serving.scheduler._shards[0].pages
    kept = {value: len(pages.match(Request("", [value] * 9, 1))) for value in (1, 2, 3)}
    assert kept == {1: 2, 2: 1, 3: 2}


def test_windows_let_go_of_what_they_have_passed() -> None:
    windowed = CacheGroup(4, 5)
    serving = Serving(limits(groups=(CacheGroup(16, None), windowed), chunk=4))
    request = serving.add(Request("a", list(range(20)), 30))
    most = 0
    while serving.scheduler.has_work:
        serving.step()
        most = max(most, serving.scheduler.used_pages[0][1])
    assert request.known == 50
    assert most <= windowed.max_pages(49, 4, 4) == 3
    serving.finish()


def test_the_last_in_order_is_preempted_and_waits_for_its_tokens_in_flight() -> None:
    serving = Serving(limits(groups=(CacheGroup(6, None),), prefix_cache=False))
    first, second = (serving.add(Request(name, [1, 2, 3], 18)) for name in "ab")
    serving.plan()
    while serving.plan() and second.slot >= 0:
        serving.land()
    assert (first.slot, second.pending, serving.scheduler.preemptions) == (0, 1, 1)
    serving.cut(first)
    assert not serving.plan()
    serving.land()
    assert serving.plan().chunks[0][0].request is second
    serving.finish()


def test_priority_overtakes_so_many_and_no_more() -> None:
    scheduler = Scheduler(limits(slots=1))
    requests = [Request(number, [1], 1) for number in range(1500)]
    for request in requests:
        scheduler.add(request)
    urgent = Request("urgent", [1], 1, priority=1)
    scheduler.add(urgent)
    order = []
    while scheduler.has_work:
        plan = scheduler.plan()
        order += [chunk.request for chunk in plan.chunks[0]]
        scheduler.update_from_output(plan, {request: [0] for request, _ in plan.planned_tokens()})
    assert order == [*requests[:501], urgent, *requests[501:]]


@pytest.mark.parametrize(("lengths", "steps"), [([9, 3], [8]), ([4, 3], [3]), ([3, 2], [2])])
def test_a_dispatch_has_as_many_decode_steps_as_are_of_use(lengths: list[int], steps: list[int]) -> None:
    scheduler = Scheduler(limits(decode_steps=8))
    for number, most in enumerate(lengths):
        scheduler.add(Request(number, [1], most))
    assert scheduler.plan().steps == 1
    plan = scheduler.plan()
    assert [plan.steps] == steps
    assert plan.decodes[0].steps == [most - 1 for most in lengths]


def test_what_cannot_be_served_is_refused() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(Request("a", [1], 1))
    with pytest.raises(RequestError, match="own id"):
        scheduler.add(Request("a", [1], 1))
    scheduler.add(Request("fits", [1], 64))
    with pytest.raises(RequestError, match="needs 17 pages"):
        scheduler.add(Request("long", [1], 65))
    with pytest.raises(RequestError, match="at least one token"):
        Request("b", [], 1)
    with pytest.raises(RequestError, match="to generate"):
        Request("b", [1], 0)
    assert scheduler.finish("a")
    assert not scheduler.finish("a")
    assert not scheduler.finish("unknown")
    assert scheduler.waiting == 1


@pytest.mark.parametrize(
    "changed", [{"slots": 0}, {"groups": ()}, {"groups": (CacheGroup(0, None),)}, {"groups": (CacheGroup(1, 0),)}]
)
def test_limits_make_sense(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        limits(**changed)
