"""The scheduler of requests that are decoded in blocks, with a device that finds every wrong page and position.

Its "keys and values" of a position say the tokens up to the end of its block, or that these are not all chosen yet. How
many steps a block takes only the device knows.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from moe_jax.errors import ConfigError, RequestError
from moe_jax.scheduler import CacheGroup, DiffusionRequest, DiffusionScheduler, Limits, Plan, Request

WORKLOADS, LONGEST = 2_000, 40
STOP = 0
UNFINISHED = -1


def chosen(before: Sequence[int], block: int, vocabulary: int) -> list[int]:
    """The tokens that the toy model has for the rest of a block."""
    begin = len(before) // block * block
    return [hash((tuple(before), place)) % vocabulary for place in range(len(before), begin + block)]


def steps_of(before: Sequence[int]) -> int:
    return 1 + hash(tuple(before)) % 4


def continuation(request: DiffusionRequest, vocabulary: int) -> list[int]:
    """Up to the end of the block in which it stops."""
    known, prompt = list(request.prompt), len(request.prompt)
    while len(known) < prompt + request.max_tokens and STOP not in known[prompt:]:
        known += chosen(known, request.block, vocabulary)
    return known[prompt : prompt + request.max_tokens]


@dataclass
class Place:
    """What the device remembers of a slot."""

    request: DiffusionRequest
    tokens: list[int]
    """All that are chosen; where these end with a block, that is not known to be written."""
    written: int
    """Positions that hold what they shall."""
    left: int
    """Steps until the next block is chosen."""
    is_over: bool = False


class Device:
    def __init__(self, limits: Limits, vocabulary: int) -> None:
        self.limits, self.vocabulary = limits, vocabulary
        self.memory: list[dict[int, object]] = [{} for _ in range(limits.shards)]
        self.places: dict[tuple[int, int], Place] = {}

    def run(self, plan: Plan) -> Mapping[Request, list[int]]:
        given: dict[Request, list[int]] = {request: [] for decodes in plan.decodes for request in decodes.requests}
        lines = [(request, position + steps) for decodes in plan.decodes for request, position, steps in decodes]
        for _ in range(plan.steps):
            for request, limit in lines:
                given[request] += self.step(self.places[request.shard, request.slot], request, limit)
        for shard, chunks in enumerate(plan.chunks):
            for chunk in chunks:
                assert isinstance(chunk.request, DiffusionRequest)
                self.write(chunk.request, shard, chunk.start, chunk.end, chunk.request.sequence(0, chunk.end))
            for chunk in chunks:
                request, known = chunk.request, list(chunk.request.sequence(0, chunk.end))
                assert isinstance(request, DiffusionRequest)
                self.check(request, shard, chunk.start, known)
                if chunk.samples:
                    assert chunk.end == request.known
                    whole = chunk.end // self.limits.block * self.limits.block
                    self.places[shard, request.slot] = Place(request, known, whole, steps_of(known))
        return given

    def step(self, place: Place, request: Request, limit: int) -> list[int]:
        block = self.limits.block
        assert place.request is request, "a slot is that of its own request"
        if place.is_over or place.written + block > limit:
            return []
        self.check(place.request, request.shard, place.written, place.tokens)
        self.write(place.request, request.shard, place.written, place.written + block, place.tokens)
        if len(place.tokens) == place.written + block:
            place.written, place.left = place.written + block, steps_of(place.tokens)
            return []
        place.left -= 1
        if place.left:
            return []
        new = chosen(place.tokens, block, self.vocabulary)
        end = len(request.prompt) + request.max_tokens
        told = new[: end - len(place.tokens)]
        place.tokens += new
        place.is_over = STOP in told or len(place.tokens) >= end
        return told

    def write(self, request: DiffusionRequest, shard: int, start: int, end: int, tokens: Sequence[int]) -> None:
        for position in range(start, end):
            last = position // self.limits.block * self.limits.block + self.limits.block
            known = tuple(tokens[:last]) if len(tokens) >= last else UNFINISHED
            self.memory[shard][self.cell(request, position)] = known, position

    def check(self, request: DiffusionRequest, shard: int, end: int, tokens: Sequence[int]) -> None:
        """What lies in the blocks before `end`."""
        for position in range(end):
            last = position // self.limits.block * self.limits.block + self.limits.block
            assert self.memory[shard][self.cell(request, position)] == (tuple(tokens[:last]), position)

    def cell(self, request: DiffusionRequest, position: int) -> int:
        (table,) = request.pages
        page, within = divmod(position, self.limits.page)
        assert page < len(table.ids), "there is a page for each position"
        return table.ids[page] * self.limits.page + within


class Serving:
    def __init__(self, limits: Limits, vocabulary: int, ahead: int) -> None:
        self.scheduler, self.device = DiffusionScheduler(limits), Device(limits, vocabulary)
        self.flight: deque[tuple[Plan, Mapping[Request, list[int]]]] = deque()
        self.requests: list[DiffusionRequest] = []
        self.cut: set[DiffusionRequest] = set()
        self.ahead, self.vocabulary, self.plans = ahead, vocabulary, 0

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.plans += 1
        assert plan or self.flight
        for chunks, rows, decodes in zip(plan.chunks, plan.rows, plan.decodes, strict=True):
            block, limits = self.scheduler.limits.block, self.scheduler.limits
            assert all(chunk.start % block == 0 for chunk in chunks)
            assert rows - len(decodes) * block <= limits.rows
        if plan:
            self.flight.append((plan, self.device.run(plan)))
        while len(self.flight) > (self.ahead if plan else 0):
            before, given = self.flight.popleft()
            self.scheduler.update_from_output(before, given)
            for request, tokens in given.items():
                if STOP in tokens:
                    self.scheduler.finish(request.id)

    def finish(self) -> None:
        while self.scheduler.has_work or self.flight:
            self.step()
            assert self.plans < 20_000
        for request in self.requests:
            right = continuation(request, self.vocabulary)
            assert request.tokens == (right[: len(request.tokens)] if request in self.cut else right)
        for shard in self.scheduler._shards:
            (pool,) = shard.pages.pools
            assert not pool.used


def workload(seed: int) -> Serving:
    draw = random.Random(seed)
    block, page = draw.choice([(1, 2), (2, 4), (3, 2), (4, 4), (6, 4), (8, 4), (8, 2)])
    whole = -(-LONGEST // block) * block
    limits = Limits(
        shards=draw.choice([1, 2]),
        slots=draw.randint(1, 4),
        page=page,
        groups=(CacheGroup(-(-whole // page) + draw.choice([0, 0, 3, 30]), None),),
        chunk=block * draw.randint(1, 4),
        chunks=draw.randint(1, 3),
        rows=block * draw.randint(1, 5),
        decode_steps=draw.choice([1, 2, 5, 8]),
        prefix_cache=draw.random() < 0.8,
        block=block,
    )
    serving = Serving(limits, draw.choice([3, 40]), ahead=draw.choice([0, 1, 1, 2]))
    root = [draw.randrange(1, 3) for _ in range(24)]
    for number in range(draw.randint(1, 7)):
        for _ in range(draw.choice([0, 1, 4, 20])):
            if serving.scheduler.has_work:
                serving.step()
        ended = [r.sequence(0, r.known) for r in serving.requests if r.ended and r.known < LONGEST - 4]
        begin = draw.choice(ended) if ended and draw.random() < 0.4 else root[: draw.randint(0, 24)]
        prompt = [*begin, *(draw.randrange(3) for _ in range(draw.randint(1, 4)))]
        most = draw.randint(1, LONGEST - len(prompt))
        request = DiffusionRequest(number, prompt, most, draw.choice([0, 0, 1]), draw.random() < 0.9, block=block)
        serving.scheduler.add(request)
        serving.requests.append(request)
        if draw.random() < 0.1:
            other = draw.choice(serving.requests)
            serving.cut |= {other} if serving.scheduler.finish(other.id) else set()
    serving.finish()
    return serving


def test_random_workloads_end_with_the_right_tokens_and_all_pages_back() -> None:
    totals = Counter[str]()
    for seed in range(WORKLOADS):
        try:
            serving = workload(seed)
        except AssertionError as error:
            raise AssertionError(f"workload {seed}: {error}") from error
        totals["cut short"] += len(serving.cut)
        totals["tokens"] += sum(len(request.tokens) for request in serving.requests)
        totals["preemptions"] += serving.scheduler.preemptions
        totals["positions shared"] += serving.scheduler.prefix_hits
    assert min(totals.values()) > WORKLOADS // 100, "each of these was tried"


def test_a_page_is_shared_only_with_all_of_its_last_block() -> None:
    limits = Limits(1, 2, 4, (CacheGroup(20, None),), 24, 2, 24, 1, True, block=8)
    for ending, shared in (([6, 7, 8], 8), ([6, 7, 9], 0)):
        serving = Serving(limits, 40, 0)
        for prompt in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, *ending, 3]):
            request = DiffusionRequest(len(serving.requests), prompt, 1, block=8)
            serving.scheduler.add(request)
            serving.requests.append(request)
        serving.finish()
        assert serving.scheduler.prefix_hits == shared


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole blocks of 3"):
        Limits(1, 1, 4, (CacheGroup(4, None),), 8, 1, 9, 1, True, block=3)
    scheduler = DiffusionScheduler(Limits(1, 1, 4, (CacheGroup(3, None),), 8, 1, 8, 1, True, block=8))
    scheduler.add(DiffusionRequest("fits", [1] * 5, 3, block=8))
    with pytest.raises(RequestError, match="needs 4 pages"):
        scheduler.add(DiffusionRequest("long", [1] * 5, 4, block=8))
