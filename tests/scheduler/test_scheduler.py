"""Scheduler on small cases: prefix cache, windows, preemption, priorities, decode steps, and refused requests."""

from __future__ import annotations

from typing import Any

import pytest
from simulation import Simulation

from moe_jax.errors import ConfigError, RequestError
from moe_jax.scheduler import CacheGroup, Limits, Request, Scheduler


def limits(**changed: Any) -> Limits:
    small: dict[str, Any] = {
        "shards": 1, "slots": 4, "page": 4, "groups": (CacheGroup(16, None),), "max_chunk_tokens": 8,
        "max_prefills": 2, "max_rows": 16,
        "decode_steps": 1, "prefix_cache": True,
    }  # fmt: skip
    return Limits(**small | changed)


def test_prefix_is_shared_in_the_step_that_computes_it_and_the_last_token_is_computed() -> None:
    simulation = Simulation(limits())
    first, second = (simulation.add(Request(name, range(8), 3)) for name in "ab")
    (chunks,) = simulation.step().chunks
    assert [(chunk.request, chunk.start, chunk.end) for chunk in chunks] == [(first, 0, 8), (second, 4, 8)]
    assert first.pages[0].ids[0] == second.pages[0].ids[0]
    simulation.finish()
    assert simulation.scheduler.prefix_hits == second.cached == 4


def test_request_without_prefix_sharing_neither_reads_nor_writes_the_prefix_cache() -> None:
    simulation = Simulation(limits())
    for name, shares in (("a", False), ("b", True), ("c", False), ("d", True)):
        simulation.add(Request(name, range(9), 1, shares_prefix=shares))
        simulation.finish() if name == "d" else simulation.step()
    assert [request.cached for request in simulation.requests] == [0, 0, 0, 8]


def test_generated_pages_are_shared_once_the_next_token_is_known() -> None:
    simulation = Simulation(limits())
    first = simulation.add(Request("a", [1, 2, 3], 6))
    simulation.run()
    sequence = [*first.prompt, *first.tokens]
    assert len(sequence) == 9
    second = simulation.add(Request("b", [*sequence, 0], 1))
    simulation.finish()
    assert second.cached == 8


def test_eviction_is_least_recently_used_first_and_children_before_parents() -> None:
    simulation = Simulation(limits(groups=(CacheGroup(6, None),), slots=1))
    for name, prompt in enumerate(([1] * 9, [2] * 9, [1] * 9, [3] * 9)):
        simulation.add(Request(name, prompt, 1))
    simulation.run()
    pages = simulation.scheduler._shards[0].pages
    cached = {token: len(pages.match_prefix(Request("", [token] * 9, 1))) for token in (1, 2, 3)}
    assert cached == {1: 2, 2: 1, 3: 2}


def test_pages_that_a_window_has_passed_are_freed() -> None:
    windowed = CacheGroup(4, 5)
    simulation = Simulation(limits(groups=(CacheGroup(16, None), windowed), max_chunk_tokens=4))
    request = simulation.add(Request("a", list(range(20)), 30))
    largest = 0
    while simulation.scheduler.has_work:
        simulation.step()
        largest = max(largest, simulation.scheduler.used_pages[0][1])
    assert request.known == 50
    assert largest <= windowed.max_pages(49, 4, 4) == 3
    simulation.finish()


def test_last_request_is_preempted_and_waits_for_its_pending_tokens() -> None:
    simulation = Simulation(limits(groups=(CacheGroup(6, None),), prefix_cache=False))
    first, second = (simulation.add(Request(name, [1, 2, 3], 18)) for name in "ab")
    simulation.plan()
    while simulation.plan() and second.slot >= 0:
        simulation.update_from_output()
    assert (first.slot, second.pending, simulation.scheduler.preemptions) == (0, 1, 1)
    simulation.cancel(first)
    assert not simulation.plan()
    simulation.update_from_output()
    assert simulation.plan().chunks[0][0].request is second
    simulation.finish()


def test_priority_overtakes_a_bounded_number_of_requests() -> None:
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


@pytest.mark.parametrize(("lengths", "steps"), [([9, 3], 8), ([4, 3], 3), ([3, 2], 2)])
def test_dispatch_has_only_useful_decode_steps(lengths: list[int], steps: int) -> None:
    scheduler = Scheduler(limits(decode_steps=8))
    for number, max_tokens in enumerate(lengths):
        scheduler.add(Request(number, [1], max_tokens))
    assert scheduler.plan().steps == 1
    plan = scheduler.plan()
    assert plan.steps == steps
    assert plan.decodes[0].steps == [max_tokens - 1 for max_tokens in lengths]


def test_invalid_requests_are_refused() -> None:
    scheduler = Scheduler(limits())
    scheduler.add(Request("a", [1], 1))
    with pytest.raises(RequestError, match="own id"):
        scheduler.add(Request("a", [1], 1))
    scheduler.add(Request("fits", [1], 64))
    with pytest.raises(RequestError, match=r"needs 17 pages .* to at most 64 tokens together"):
        scheduler.add(Request("long", [1], 65))
    scheduler.add(Request("advised", [1], 63))
    with pytest.raises(RequestError, match="at least one token"):
        Request("b", [], 1)
    with pytest.raises(RequestError, match="max_tokens must be 1 or more, got 0"):
        Request("b", [1], 0)
    assert scheduler.finish("a")
    assert not scheduler.finish("a")
    assert not scheduler.finish("unknown")
    assert scheduler.waiting == 2


def test_advice_for_a_long_request_holds_in_all_windows() -> None:
    scheduler = Scheduler(limits(groups=(CacheGroup(5, None), CacheGroup(3, 6), CacheGroup(2, 1)), decode_steps=7))
    with pytest.raises(RequestError, match=r"needs 3 pages .* a token shard has 2: .* to at most 8 tokens together"):
        scheduler.add(Request("long", [1] * 20, 20))
    scheduler.add(Request("advised", [1] * 4, 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"slots": 0}, "slots must be 1 or more, got 0"),
        ({"groups": ()}, "at least one cache group"),
        ({"groups": (CacheGroup(0, None),)}, "at least one page"),
        ({"groups": (CacheGroup(1, 0),)}, "a window of at least 1"),
    ],
)
def test_invalid_limits_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limits(**changed)
