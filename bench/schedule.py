"""The scheduler alone: how even the rows of token shards are, and what a plan costs.

    balance    mean of the shards' decode rows over the most of any, averaged over steps, as the slowest shard sets the
               pace: requests arrive all the time, and a few are many times as long as the others
    plan       the next dispatch, of requests that all decode; `update_from_output` takes its tokens

Round robin, which sends each request to the shard after the last one's, stands beside.

python -m bench.schedule [--requests 1024] [--steps 1,8] [--quick]; --help lists the rest.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import script
from bench.timing import Times
from moe_jax.scheduler import CacheGroup, Limits, Plan, Request, Scheduler

QUICK = {"repeats": 20, "requests": 64, "arrivals": 1500}
SHARDS, PAGE, PROMPT, PAGES = 8, 16, 100, 1 << 16
LOAD, LONGEST, SHAPE = 0.7, 2000, 1.1
"""The share of slots that arrivals keep busy, and the lengths' Pareto law."""


class RoundRobin(Scheduler):
    """Takes shards in turn."""

    step_input = 0

    def rank_shards(self, request: Request, shards: Sequence[Any]) -> list[Any]:
        chosen = sorted(shards, key=lambda place: (place[0].number - self.step_input) % SHARDS)
        if chosen:
            self.step_input = chosen[0][0].number + 1
        return chosen


def limits(slots: int, steps: int = 1, windows: Sequence[int | None] = (None,)) -> Limits:
    groups = tuple(CacheGroup(PAGES, window) for window in windows)
    return Limits(SHARDS, slots, PAGE, groups, 512, 4, 4 * 512 + slots, steps, prefix_cache=True)


def balance(scheduler: Scheduler, arrivals: int) -> float:
    """The mean over steps of mean over most decode rows, once as many requests run as will, until no more arrive."""
    draw = random.Random(0)
    lengths = [min(int(10 * draw.paretovariate(SHAPE)), LONGEST) for _ in range(arrivals)]
    slots = LOAD * SHARDS * scheduler.limits.slots
    rate, due, sent = slots / (sum(lengths) / arrivals), 0.0, 0
    found = []
    while sent < arrivals:
        due += draw.expovariate(1 / rate)
        while sent < min(due, arrivals):
            scheduler.add(Request(sent, [sent] * draw.randint(1, PROMPT), lengths[sent]))
            sent += 1
        plan = scheduler.plan()
        rows = [len(decodes) for decodes in plan.decodes]
        if sent > arrivals // 3 and any(rows):
            found.append(sum(rows) / len(rows) / max(rows))
        land(scheduler, plan)
    return sum(found) / len(found)


def land(scheduler: Scheduler, plan: Plan) -> float:
    """Seconds that it takes the scheduler to be told a plan's tokens."""
    tokens = {request: [1] * count for request, count in plan.planned_tokens()}
    began = time.perf_counter()
    scheduler.update_from_output(plan, tokens)
    return time.perf_counter() - began


def cost(requests: int, steps: int, windows: Sequence[int | None], repeats: int) -> dict[str, Any]:
    """Seconds of plans and landings of requests that all decode."""
    scheduler = Scheduler(limits(-(-requests // SHARDS), steps, windows))
    for number in range(requests):
        scheduler.add(Request(number, range(number, number + PROMPT + number % PAGE), 10 * steps * repeats))
    before, planned, update_from_output = scheduler.plan(), [], []
    while len(planned) < repeats:
        began = time.perf_counter()
        plan = scheduler.plan()
        took = time.perf_counter() - began
        seconds = land(scheduler, before)
        if sum(map(len, before.decodes)) == requests:
            planned.append(took)
            update_from_output.append(seconds)
        before = plan
    return {"plan": Times(np.array(planned)).as_dict(), "landed": Times(np.array(update_from_output)).as_dict()}


def main() -> None:
    options, placement = script.begin(arguments(), QUICK)
    even = {
        name: balance(kind(limits(options.slots)), options.arrivals)
        for name, kind in {"fewest requests": Scheduler, "round robin": RoundRobin}.items()
    }
    print(f"{SHARDS} shards of {options.slots} slots, {options.arrivals} requests")
    table = script.Table({"shard chosen by": "<16", "balance": ">8"})
    for name, share in even.items():
        table.row(name, f"{share:.3f}")
    table = script.Table({"requests": ">8", "steps": ">6", "windows": ">12", "plan ms": ">13", "landed ms": ">13"})
    results = []
    for steps in options.steps:
        for windows in ((None,), (None, 128)):
            found = cost(options.requests, steps, windows, options.repeats)
            cells = (f"{found[name]['ms']:.3f} ±{found[name]['spread']:4.0%}" for name in ("plan", "landed"))
            table.row(options.requests, steps, ", ".join(map(str, windows)), *cells)
            results.append({"steps": steps, "windows": windows, **found})
    script.finish("schedule", options, placement, {"balance": even, "results": results}, partial(draw, results=results))


def arguments() -> ArgumentParser:
    parser = script.parser("schedule", "The scheduler alone: evenness of rows, and the cost of a plan.", repeats=200)
    parser.add_argument("--requests", type=script.positive, default=1024, help="that run at once")
    parser.add_argument("--steps", type=script.several(script.positive), default=[1, 8], help="of a dispatch")
    parser.add_argument("--slots", type=script.positive, default=64, help="of a shard, for the balance")
    parser.add_argument("--arrivals", type=script.positive, default=20_000, help="requests, for the balance")
    return parser


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    labels = [f"{result['steps']} steps, windows {result['windows']}" for result in results]
    script.bars(axes, labels, {name: [result[name] for result in results] for name in ("plan", "landed")})


if __name__ == "__main__":
    script.run(main)
