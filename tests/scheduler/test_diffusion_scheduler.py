"""Scheduler of block-diffusion requests, on a toy device that checks every page and position it reads.

The "keys and values" of a position are all tokens up to the end of its block, or a mark that some are not known yet.
Only the device knows how many steps a block takes.
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
UNKNOWN = -1
"""Content of a position in a block with masked tokens."""


def block_tokens(before: Sequence[int], block: int, vocabulary: int) -> list[int]:
    """Tokens that the toy model generates for the rest of a block."""
    start = len(before) // block * block
    return [hash((tuple(before), position)) % vocabulary for position in range(len(before), start + block)]


def denoising_steps(before: Sequence[int]) -> int:
    """Number of steps that the toy model takes for the next block."""
    return 1 + hash(tuple(before)) % 4


def continuation(request: DiffusionRequest, vocabulary: int) -> list[int]:
    """Tokens that the toy model generates, up to the end of the block with a stop token."""
    known, prompt = list(request.prompt), len(request.prompt)
    while len(known) < prompt + request.max_tokens and STOP not in known[prompt:]:
        known += block_tokens(known, request.block, vocabulary)
    return known[prompt : prompt + request.max_tokens]


@dataclass
class SlotState:
    """State of a slot on the device."""

    request: DiffusionRequest
    tokens: list[int]
    """Known tokens. If they end with a block, the cache of that block may not be written yet."""
    written: int
    """Number of positions whose cache is final."""
    steps_left: int
    """Number of steps until the next block is generated."""
    ended: bool = False


class DiffusionDevice:
    """Device that runs plans in order, block by block."""

    def __init__(self, limits: Limits, vocabulary: int) -> None:
        self.limits, self.vocabulary = limits, vocabulary
        self.memory: list[dict[int, object]] = [{} for _ in range(limits.shards)]
        self.slots: dict[tuple[int, int], SlotState] = {}

    def run(self, plan: Plan) -> Mapping[Request, list[int]]:
        outputs: dict[Request, list[int]] = {request: [] for decodes in plan.decodes for request in decodes.requests}
        ends = [(request, position + steps) for decodes in plan.decodes for request, position, steps in decodes]
        for _ in range(plan.steps):
            for request, end in ends:
                outputs[request] += self.step(self.slots[request.shard, request.slot], request, end)
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
                    written = chunk.end // self.limits.block * self.limits.block
                    self.slots[shard, request.slot] = SlotState(request, known, written, denoising_steps(known))
        return outputs

    def step(self, slot: SlotState, request: Request, end: int) -> list[int]:
        """Run one denoising step, if the block lies before `end`, and return the tokens that it completes."""
        block = self.limits.block
        assert slot.request is request, "a slot holds the state of its own request"
        if slot.ended or slot.written + block > end:
            return []
        self.check(slot.request, request.shard, slot.written, slot.tokens)
        self.write(slot.request, request.shard, slot.written, slot.written + block, slot.tokens)
        if len(slot.tokens) == slot.written + block:
            slot.written, slot.steps_left = slot.written + block, denoising_steps(slot.tokens)
            return []
        slot.steps_left -= 1
        if slot.steps_left:
            return []
        new = block_tokens(slot.tokens, block, self.vocabulary)
        longest = len(request.prompt) + request.max_tokens
        emitted = new[: longest - len(slot.tokens)]
        slot.tokens += new
        slot.ended = STOP in emitted or len(slot.tokens) >= longest
        return emitted

    def write(self, request: DiffusionRequest, shard: int, start: int, end: int, tokens: Sequence[int]) -> None:
        for position in range(start, end):
            block_end = self.block_end(position)
            content = tuple(tokens[:block_end]) if len(tokens) >= block_end else UNKNOWN
            self.memory[shard][self.cell(request, position)] = content, position

    def check(self, request: DiffusionRequest, shard: int, end: int, tokens: Sequence[int]) -> None:
        """Check the content of the positions before `end`."""
        for position in range(end):
            expected = tuple(tokens[: self.block_end(position)]), position
            assert self.memory[shard][self.cell(request, position)] == expected

    def block_end(self, position: int) -> int:
        return (position // self.limits.block + 1) * self.limits.block

    def cell(self, request: DiffusionRequest, position: int) -> int:
        """Index of a position in the memory of its token shard."""
        (table,) = request.pages
        page, offset = divmod(position, self.limits.page)
        assert page < len(table.ids), "each position has a page"
        return table.ids[page] * self.limits.page + offset


class DiffusionSimulation:
    """Scheduler and device, with the invariants that hold after each plan.

    Args:
      ahead: number of plans made before the tokens of the first of them are known.
    """

    def __init__(self, limits: Limits, vocabulary: int, ahead: int) -> None:
        self.scheduler, self.device = DiffusionScheduler(limits), DiffusionDevice(limits, vocabulary)
        self.in_flight: deque[tuple[Plan, Mapping[Request, list[int]]]] = deque()
        self.requests: list[DiffusionRequest] = []
        self.cancelled: set[DiffusionRequest] = set()
        self.ahead, self.vocabulary, self.plans = ahead, vocabulary, 0

    def add(self, request: DiffusionRequest) -> None:
        self.scheduler.add(request)
        self.requests.append(request)

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.plans += 1
        assert plan or self.in_flight
        limits = self.scheduler.limits
        for chunks, rows, decodes in zip(plan.chunks, plan.rows, plan.decodes, strict=True):
            assert all(chunk.start % limits.block == 0 for chunk in chunks)
            assert rows - len(decodes) * limits.block <= limits.max_rows
        if plan:
            self.in_flight.append((plan, self.device.run(plan)))
        while len(self.in_flight) > (self.ahead if plan else 0):
            before, outputs = self.in_flight.popleft()
            self.scheduler.update_from_output(before, outputs)
            for request, tokens in outputs.items():
                if STOP in tokens:
                    self.scheduler.finish(request.id)

    def finish(self) -> None:
        while self.scheduler.has_work or self.in_flight:
            self.step()
            assert self.plans < 20_000
        for request in self.requests:
            expected = continuation(request, self.vocabulary)
            assert request.tokens == (expected[: len(request.tokens)] if request in self.cancelled else expected)
        for shard in self.scheduler._shards:
            (pool,) = shard.pages.pools
            assert not pool.used


def random_limits(rng: random.Random) -> Limits:
    block, page = rng.choice([(1, 2), (2, 4), (3, 2), (4, 4), (6, 4), (8, 4), (8, 2)])
    longest = -(-LONGEST // block) * block
    return Limits(
        shards=rng.choice([1, 2]),
        slots=rng.randint(1, 4),
        page=page,
        groups=(CacheGroup(-(-longest // page) + rng.choice([0, 0, 3, 30]), None),),
        max_chunk_tokens=block * rng.randint(1, 4),
        max_prefills=rng.randint(1, 3),
        max_rows=block * rng.randint(1, 5),
        decode_steps=rng.choice([1, 2, 5, 8]),
        prefix_cache=rng.random() < 0.8,
        block=block,
    )


def random_workload(seed: int) -> DiffusionSimulation:
    """Run requests that arrive, stop, are cancelled, and share prefixes, with too few pages."""
    rng = random.Random(seed)
    limits = random_limits(rng)
    simulation = DiffusionSimulation(limits, rng.choice([3, 40]), ahead=rng.choice([0, 1, 1, 2]))
    root = [rng.randrange(1, 3) for _ in range(24)]
    for number in range(rng.randint(1, 7)):
        for _ in range(rng.choice([0, 1, 4, 20])):
            if simulation.scheduler.has_work:
                simulation.step()
        ended = [r.sequence(0, r.known) for r in simulation.requests if r.ended and r.known < LONGEST - 4]
        prefix = rng.choice(ended) if ended and rng.random() < 0.4 else root[: rng.randint(0, 24)]
        prompt = [*prefix, *(rng.randrange(3) for _ in range(rng.randint(1, 4)))]
        max_tokens, priority = rng.randint(1, LONGEST - len(prompt)), rng.choice([0, 0, 1])
        shares_prefix = rng.random() < 0.9
        simulation.add(DiffusionRequest(number, prompt, max_tokens, priority, shares_prefix, block=limits.block))
        if rng.random() < 0.1:
            other = rng.choice(simulation.requests)
            simulation.cancelled |= {other} if simulation.scheduler.finish(other.id) else set()
    simulation.finish()
    return simulation


def test_random_workloads_generate_the_expected_tokens_and_free_all_pages() -> None:
    totals = Counter[str]()
    for seed in range(WORKLOADS):
        try:
            simulation = random_workload(seed)
        except AssertionError as error:
            raise AssertionError(f"workload {seed}: {error}") from error
        totals["cancelled"] += len(simulation.cancelled)
        totals["tokens"] += sum(len(request.tokens) for request in simulation.requests)
        totals["preemptions"] += simulation.scheduler.preemptions
        totals["prefix hits"] += simulation.scheduler.prefix_hits
    assert min(totals.values()) > WORKLOADS // 100, "the workloads cover each case"


def test_page_is_shared_only_with_all_of_its_last_block() -> None:
    limits = Limits(1, 2, 4, (CacheGroup(20, None),), 24, 2, 24, 1, True, block=8)
    for ending, shared in (([6, 7, 8], 8), ([6, 7, 9], 0)):
        simulation = DiffusionSimulation(limits, 40, 0)
        for number, prompt in enumerate(([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, *ending, 3])):
            simulation.add(DiffusionRequest(number, prompt, 1, block=8))
        simulation.finish()
        assert simulation.scheduler.prefix_hits == shared


@pytest.mark.parametrize("rows", [16, 24, 512])
def test_short_prompts_begin_soon_beside_a_long_one(rows: int) -> None:
    limits = Limits(1, 40, 16, (CacheGroup(4000, None),), rows, 8, rows, 4, True, block=8)
    simulation = DiffusionSimulation(limits, 40, ahead=0)
    simulation.add(DiffusionRequest("long", [1] * 12 * rows, 1, block=8))
    simulation.step()
    for number in range(3):
        short = DiffusionRequest(number, [number] * 7, 1, block=8)
        simulation.add(short)
        simulation.step()
        assert short.computed == 7, "half of the rows are whole blocks"
    simulation.finish()
    assert simulation.plans <= 24


def test_invalid_limits_and_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_chunk_tokens must be a multiple of the block size, 3, got 8"):
        Limits(1, 1, 4, (CacheGroup(4, None),), 8, 1, 9, 1, True, block=3)
    scheduler = DiffusionScheduler(Limits(1, 1, 4, (CacheGroup(3, None),), 8, 1, 8, 1, True, block=8))
    scheduler.add(DiffusionRequest("fits", [1] * 5, 3, block=8))
    with pytest.raises(RequestError, match="needs 4 pages"):
        scheduler.add(DiffusionRequest("long", [1] * 5, 4, block=8))
