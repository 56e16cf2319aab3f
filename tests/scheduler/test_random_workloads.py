"""Random workloads of the scheduler, on a toy device that checks every page it reads."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from simulation import Simulation, random_limits, random_request

WORKLOADS, BATCH = 10_000, 2_000


def random_workload(seed: int) -> Simulation:
    """Run requests that arrive, stop, are cancelled, and share prefixes, with too few pages."""
    rng = random.Random(seed)
    vocabulary = rng.choice([3, 10, 50])
    limits = random_limits(rng, rng.choice([1, 2, 3, 4]))
    simulation = Simulation(limits, vocabulary, rng.choice([None, 0]), ahead=rng.choice([0, 1, 1, 1, 2]))
    roots = [[rng.randrange(vocabulary) for _ in range(10)] for _ in range(2)]
    arrivals = sorted(rng.randint(0, 12) for _ in range(rng.randint(1, 7)))
    for arrival in arrivals:
        while simulation.plans < arrival and simulation.scheduler.has_work:
            simulation.step()
        if simulation.requests and rng.random() < 0.1:
            simulation.cancel(rng.choice(simulation.requests))
        simulation.add(random_request(rng, simulation, roots))
    simulation.finish()
    work = sum(len(request.prompt) + request.max_tokens + 2 for request in simulation.requests)
    assert simulation.plans <= arrivals[-1] + 2 * work, "each plan advances the first request in the queue"
    return simulation


@pytest.mark.parametrize("first", range(0, WORKLOADS, BATCH))
def test_random_workloads_generate_the_expected_tokens_and_free_all_pages(first: int) -> None:
    start, totals = time.perf_counter(), Counter[str]()
    for seed in range(first, first + BATCH):
        try:
            simulation = random_workload(seed)
        except AssertionError as error:
            raise AssertionError(f"workload {seed}: {error}") from error
        totals["requests"] += len(simulation.requests)
        totals["cancelled"] += len(simulation.cancelled)
        totals["plans"] += simulation.plans
        totals["tokens"] += sum(len(request.tokens) for request in simulation.requests)
        totals["preemptions"] += simulation.scheduler.preemptions
        totals["prefix hits"] += simulation.scheduler.prefix_hits
    print(f"{BATCH} workloads in {time.perf_counter() - start:.1f} s: {dict(totals)}")
    assert min(totals.values()) > BATCH // 100, "the workloads cover each case"


class SchedulerMachine(RuleBasedStateMachine):
    """State machine that calls the scheduler in any order, with any number of plans in flight."""

    @initialize(seed=st.integers(0, 2**32), page=st.integers(1, 4))
    def start(self, seed: int, page: int) -> None:
        self.rng = random.Random(seed)
        limits = random_limits(self.rng, page)
        self.simulation = Simulation(limits, self.rng.choice([3, 20]), self.rng.choice([None, 0]))
        self.roots = [[self.rng.randrange(self.simulation.vocabulary) for _ in range(10)]]

    @rule()
    def add(self) -> None:
        self.simulation.add(random_request(self.rng, self.simulation, self.roots))

    @rule()
    def plan(self) -> None:
        self.simulation.plan()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def update_from_output(self) -> None:
        self.simulation.update_from_output()

    @precondition(lambda self: self.simulation.requests)
    @rule(number=st.integers(0, 1000))
    def cancel(self, number: int) -> None:
        request = self.simulation.requests[number % len(self.simulation.requests)]
        if request.ended:
            assert not self.simulation.scheduler.finish(request.id)
        else:
            assert self.simulation.cancel(request)
        assert request.ended

    @invariant()
    def pages_are_counted(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check_pages()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.finish()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
