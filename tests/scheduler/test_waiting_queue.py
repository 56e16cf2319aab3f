"""Waiting requests: those that lack pages, bursts, and requests of equal priority."""

from __future__ import annotations

from typing import Any

import pytest
from clock import GIANT, SHORT, SOON, Clock

from moe_jax.scheduler import CacheGroup, Request
from moe_jax.scheduler.waiting_queue import LOOK_AHEAD, MAX_PASSED


def blocked_by_pages(**changed: Any) -> tuple[Clock, Request, Request]:
    """Clock with a giant that decodes, and a second one that waits for its pages."""
    clock = Clock(groups=(CacheGroup(4000, None),), **changed)
    first, second = clock.add(GIANT, max_tokens=3000), clock.add(GIANT)
    clock.latest_end([first])
    return clock, first, second


def test_short_prompts_pass_a_prompt_that_lacks_pages() -> None:
    clock, _, second = blocked_by_pages()
    assert clock.latest_begin([clock.add(SHORT) for _ in range(20)]) <= SOON
    assert second.slot < 0


def test_prompt_that_lacks_pages_is_passed_by_a_bounded_number() -> None:
    """Afterwards, no request begins before it, so that it gets the next pages."""
    clock, first, second = blocked_by_pages()
    shorts: list[Request] = []
    while second.passed < MAX_PASSED:
        shorts += [clock.add(SHORT) for _ in range(3)]
        clock.step()
        assert second.passed == sum(short in clock.began for short in shorts)
    late = clock.add(SHORT)
    clock.steps(10)
    assert late not in clock.began
    clock.scheduler.finish(first.id)
    clock.step()
    assert second in clock.began
    assert clock.latest_begin([late]) <= clock.plans


def test_no_request_passes_a_preempted_one() -> None:
    clock = Clock(page=4, groups=(CacheGroup(6, None),), decode_steps=1, prefix_cache=False)
    first, second = clock.add(3, max_tokens=18), clock.add(3, max_tokens=18)
    while not clock.scheduler.preemptions:
        clock.step()
    third = clock.add(1, max_tokens=1)
    clock.latest_end([third])
    assert first.ended
    assert second.slot >= 0
    assert second.passed == 0


def test_only_a_few_prompts_of_one_length_are_looked_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst of prompts without pages costs each plan a constant number of looks at the prefix cache."""
    clock, _, _ = blocked_by_pages()
    for _ in range(500):
        clock.add(GIANT)
    pages, looks = clock.scheduler._shards[0].pages, []
    match_prefix = pages.match_prefix
    monkeypatch.setattr(pages, "match_prefix", lambda request: looks.append(request) or match_prefix(request))
    short = clock.add(SHORT)
    clock.step()
    assert short in clock.began
    assert len(looks) == LOOK_AHEAD + 1


def test_burst_of_one_user_looks_at_each_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(shards=2)
    attempts = []
    admit = clock.scheduler._admit
    monkeypatch.setattr(
        clock.scheduler, "_admit", lambda batches, request: attempts.append(request) or admit(batches, request)
    )
    requests = [clock.add(SHORT, max_tokens=1) for _ in range(10_000)]
    late = clock.add(SHORT, priority=10)
    assert clock.latest_begin([late]) == 1
    while clock.scheduler.has_work:
        clock.step()
    assert len(attempts) <= len(requests) + 1 + clock.plans


def test_requests_of_equal_priority_begin_by_arrival() -> None:
    """Samples of two prompts that arrive alternately begin alternately."""
    clock = Clock(slots=2, max_prefills=1)
    requests = [Request((user, sample), [user] * 20, 2) for sample in range(10) for user in range(2)]
    for request in requests:
        clock.scheduler.add(request)
        clock.arrived[request] = 0
    clock.latest_begin(requests)
    assert list(clock.began) == requests
