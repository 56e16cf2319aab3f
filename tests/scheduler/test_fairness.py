"""Fairness among prompts: plans until the first chunks of short prompts, and until the end of long ones."""

from __future__ import annotations

import random

import pytest
from clock import GIANT, ROWS, SHORT, SOON, STEPS, Clock
from simulation import Simulation

from moe_jax.scheduler import CacheGroup, Limits, Request


@pytest.mark.parametrize("priority", [-1, 0, 1])
@pytest.mark.parametrize("giant_priority", [0, 1])
def test_short_prompts_begin_soon_beside_a_giant(priority: int, giant_priority: int) -> None:
    clock = Clock()
    giant = clock.add(GIANT, giant_priority)
    clock.steps(2)
    shorts = [clock.add(SHORT, priority) for _ in range(20)]
    assert clock.latest_begin(shorts) <= SOON
    assert clock.latest_end([giant]) <= STEPS + 1


def test_short_prompts_begin_soon_beside_giants_on_all_shards() -> None:
    clock = Clock(shards=8)
    giants = [clock.add(GIANT) for _ in range(16)]
    clock.steps(2)
    assert clock.latest_begin([clock.add(SHORT) for _ in range(20)]) <= SOON
    assert clock.latest_end(giants) <= 2 * STEPS + 1
    assert clock.latest_end(giants[:8]) <= STEPS + 1, "giants of one shard run one after the other"


def test_short_prompts_begin_soon_while_giants_arrive() -> None:
    clock = Clock(groups=(CacheGroup(400_000, None),))
    for number in range(60):
        clock.add(GIANT if number % 2 else 6 * ROWS)
        shorts = [clock.add(SHORT) for _ in range(5)]
        clock.steps(2)
        assert clock.latest_begin(shorts) <= SOON


@pytest.mark.parametrize(("length", "priority"), [(SHORT, 0), (100, 0), (ROWS, 0), (SHORT, 1)])
def test_giant_ends_while_short_prompts_arrive(length: int, priority: int) -> None:
    """A giant that runs gets at least half of each step."""
    clock = Clock(slots=256)
    giant = clock.add(GIANT)
    clock.step()
    while giant not in clock.ended:
        for _ in range(8):
            clock.add(length, priority)
        clock.step()
    assert clock.ended[giant] <= 2 * STEPS


@pytest.mark.parametrize("length", [SHORT, 100, ROWS, ROWS + 1, 2 * ROWS, 10 * ROWS, GIANT // 4 - ROWS])
def test_prompt_takes_twice_its_own_steps_beside_one_that_is_four_times_as_long(length: int) -> None:
    clock = Clock()
    giant = clock.add(GIANT)
    clock.step()
    request = clock.add(length)
    assert clock.latest_begin([request]) == 1
    assert clock.latest_end([request]) <= -(-2 * length // ROWS)
    assert clock.latest_end([giant]) <= -(-(GIANT + length) // ROWS) + 1


def test_prompt_waits_for_an_earlier_one_of_similar_length() -> None:
    """Two prompts of one length end sooner in turn than together."""
    clock = Clock()
    first, second = (clock.add(10 * ROWS, max_tokens=1) for _ in range(2))
    assert clock.latest_end([first, second]) == 20
    assert clock.ended[first] == clock.began[second] - 1 == 10


def test_giant_of_high_priority_does_not_wait_for_another_giant() -> None:
    clock = Clock()
    clock.add(GIANT)
    clock.steps(2)
    urgent = clock.add(GIANT, priority=1)
    assert clock.latest_end([urgent]) <= STEPS + 1


def test_rows_that_no_prompt_needs_go_to_the_giant() -> None:
    clock = Clock()
    giant = clock.add(GIANT)
    clock.add(SHORT)
    plan = clock.step()
    assert [chunk.end - chunk.start for chunk in plan.chunks[0]] == [ROWS - SHORT, SHORT]
    assert clock.latest_end([giant]) == STEPS + 1


def test_giant_alone_takes_whole_steps() -> None:
    clock = Clock()
    assert clock.latest_end([clock.add(GIANT)]) == STEPS
    samples = Clock()
    requests = [Request(number, range(GIANT), 4) for number in range(7)]
    for request in requests:
        samples.scheduler.add(request)
        samples.arrived[request] = 0
    assert samples.latest_end(requests) == STEPS + 1, "later samples wait for the pages of the first"


def test_rows_of_a_mix_are_as_many_as_the_tokens() -> None:
    """Few rows stay unused while prompts wait."""
    rng, clock = random.Random(0), Clock(shards=2)
    lengths = [rng.choice([10, 50, 200, 300, 600, 1500, 5000, 20_000]) for _ in range(300)]
    clock.latest_end([clock.add(length) for length in lengths])
    assert clock.plans <= 1.05 * sum(lengths) / (2 * ROWS)
    assert sum(clock.ended.values()) / len(lengths) < 200, "in order of arrival, the mean is 470"


def test_decoding_beside_a_giant_takes_every_step() -> None:
    clock = Clock()
    decoding = [clock.add(SHORT, max_tokens=100) for _ in range(8)]
    clock.step()
    clock.add(GIANT)
    for _ in range(STEPS):
        plan = clock.step()
        assert plan.decodes[0].requests == decoding
        assert plan.steps == 1
        assert plan.rows == [ROWS], "decode rows are among the rows of the step"


@pytest.mark.parametrize("seed", range(60))
def test_long_and_short_prompts_generate_the_expected_tokens(seed: int) -> None:
    """The toy device checks every page that it reads, with windows and too few pages."""
    rng = random.Random(seed)
    windows = rng.choice([[None], [None, 5], [7]])
    rows, page, longest = rng.choice([8, 16]), rng.choice([2, 4]), 120
    groups = tuple(
        CacheGroup(CacheGroup(1, window).max_pages(longest, rows, page) + rng.choice([0, 10, 60]), window)
        for window in windows
    )
    simulation = Simulation(
        Limits(rng.choice([1, 2]), rng.choice([4, 9]), page, groups, rows, 4, rows, rng.choice([1, 3]), True),
        vocabulary=rng.choice([3, 50]),
        stop=rng.choice([None, 0]),
    )
    for number in range(25):
        length = rng.choice([rng.randint(1, 6), rng.randint(1, 6), rng.randint(20, 110)])
        prompt = [rng.choice([1, number]), *(rng.randrange(2) for _ in range(length - 1))]
        simulation.add(Request(number, prompt, rng.randint(1, 10), rng.choice([0, 0, 1])))
        for _ in range(rng.choice([0, 1, 3])):
            simulation.step()
    simulation.finish()
