"""Load balance and cost of the scheduler alone.

    balance    mean over largest number of decode rows of a shard, averaged over steps: the slowest shard determines the
               time of a step. Requests arrive continuously, and a few are much longer than the others. The baseline is
               round robin, which sends each request to the next shard
    plan       time of planning a dispatch in which all requests decode
    update     time of `update_from_output` with the tokens of a dispatch

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
from bench.timing import Times, format_time
from moe_jax.scheduler import CacheGroup, Limits, Plan, Request, Scheduler

QUICK = {"repeats": 20, "requests": 64, "arrivals": 1500}
SHARDS, PAGE, PROMPT, PAGES = 8, 16, 100, 1 << 16
LOAD, MAX_OUTPUT, SHAPE = 0.7, 2000, 1.1
"""Share of the slots that arrivals keep busy; maximum and shape of the Pareto distribution of output lengths."""


class RoundRobin(Scheduler):
    """Scheduler that assigns requests to shards in turn."""

    next_shard = 0

    def rank_shards(self, request: Request, shards: Sequence[Any]) -> list[Any]:
        chosen = sorted(shards, key=lambda shard: (shard[0].number - self.next_shard) % SHARDS)
        if chosen:
            self.next_shard = chosen[0][0].number + 1
        return chosen


def limits(slots: int, steps: int = 1, windows: Sequence[int | None] = (None,)) -> Limits:
    groups = tuple(CacheGroup(PAGES, window) for window in windows)
    return Limits(SHARDS, slots, PAGE, groups, 512, 4, 4 * 512 + slots, steps, prefix_cache=True)


def balance(scheduler: Scheduler, arrivals: int) -> float:
    """Balance of decode rows, averaged over the steps from a third of the arrivals to the last arrival."""
    draw = random.Random(0)
    lengths = [min(int(10 * draw.paretovariate(SHAPE)), MAX_OUTPUT) for _ in range(arrivals)]
    slots = LOAD * SHARDS * scheduler.limits.slots
    rate, due, sent = slots / (sum(lengths) / arrivals), 0.0, 0
    ratios = []
    while sent < arrivals:
        due += draw.expovariate(1 / rate)
        while sent < min(due, arrivals):
            scheduler.add(Request(sent, [sent] * draw.randint(1, PROMPT), lengths[sent]))
            sent += 1
        plan = scheduler.plan()
        rows = [len(decodes) for decodes in plan.decodes]
        if sent > arrivals // 3 and any(rows):
            ratios.append(sum(rows) / len(rows) / max(rows))
        update(scheduler, plan)
    return sum(ratios) / len(ratios)


def update(scheduler: Scheduler, plan: Plan) -> float:
    """Give the scheduler the tokens of a plan; return the seconds that it takes."""
    tokens = {request: [1] * count for request, count in plan.planned_tokens()}
    began = time.perf_counter()
    scheduler.update_from_output(plan, tokens)
    return time.perf_counter() - began


def cost(requests: int, steps: int, windows: Sequence[int | None], repeats: int) -> dict[str, Any]:
    """Time of plans and updates while all requests decode."""
    scheduler = Scheduler(limits(-(-requests // SHARDS), steps, windows))
    for number in range(requests):
        scheduler.add(Request(number, range(number, number + PROMPT + number % PAGE), 10 * steps * repeats))
    previous, planned, updated = scheduler.plan(), [], []
    while len(planned) < repeats:
        began = time.perf_counter()
        plan = scheduler.plan()
        took = time.perf_counter() - began
        seconds = update(scheduler, previous)
        if sum(map(len, previous.decodes)) == requests:
            planned.append(took)
            updated.append(seconds)
        previous = plan
    return {"plan": Times(np.array(planned)).as_dict(), "landed": Times(np.array(updated)).as_dict()}


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
    table = script.Table({"requests": ">8", "steps": ">6", "windows": ">12", "plan ms": ">13", "update ms": ">13"})
    results = []
    for steps in options.steps:
        for windows in ((None,), (None, 128)):
            found = cost(options.requests, steps, windows, options.repeats)
            cells = (format_time(found[name]) for name in ("plan", "landed"))
            table.row(options.requests, steps, ", ".join(map(str, windows)), *cells)
            results.append({"steps": steps, "windows": windows, **found})
    script.finish("schedule", options, placement, {"balance": even, "results": results}, partial(draw, results=results))


def arguments() -> ArgumentParser:
    parser = script.parser("schedule", "Load balance and cost of the scheduler alone.", repeats=200)
    parser.add_argument("--requests", type=script.positive, default=1024, help="requests that run at once")
    parser.add_argument(
        "--steps", type=script.several(script.positive), default=[1, 8], help="decode steps of a dispatch"
    )
    parser.add_argument("--slots", type=script.positive, default=64, help="slots of a shard, for the balance")
    parser.add_argument(
        "--arrivals", type=script.positive, default=20_000, help="requests that arrive, for the balance"
    )
    return parser


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    labels = [f"{result['steps']} steps, windows {result['windows']}" for result in results]
    script.bars(
        axes,
        labels,
        {"plan": [result["plan"] for result in results], "update": [result["landed"] for result in results]},
    )


if __name__ == "__main__":
    script.run(main)
