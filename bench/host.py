"""Host time of a decode step, with an executor that runs nothing on the devices.

    plan       the scheduler plans a dispatch
    build      the plan becomes a `StepInput`
    put        `Programs.on_devices` transfers the `StepInput` to the devices
    update     the engine reads the output and appends the tokens to their requests
    total      all of these

Times are CPU times of the engine's thread, so other processes do not count. All are milliseconds per decode step: the
time of a dispatch divided by its number of steps. In the JSON line, `build` is `order` and `update` is `landing`.

python -m bench.host [--requests 256] [--decode-steps 1,8] [--quick]; --help lists the rest.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from bench import model, script
from bench.timing import Times, format_time
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Engine, Generation, Options, OutputQueue, make_limits, make_sizes
from moe_jax.engine.engine import InFlightStep
from moe_jax.engine.executor import Executor
from moe_jax.engine.sizes import Sizes
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE, Programs, RowLogprobs, SampledTokens, StepInput
from moe_jax.scheduler import Limits, Plan, Request, Scheduler
from moe_jax.sharding import Placement, Role

QUICK = {"repeats": 3, "requests": 16}
PROMPT = 100
PARTS = {"plan": "plan", "order": "build", "put": "put", "landing": "update", "total": "total"}
"""Printed name of each part, by its key in the JSON line."""
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class Stopwatch:
    """CPU seconds of each part, a number for each dispatch."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.seconds[part].append(time.thread_time() - began)


class InstantExecutor(Executor):
    """Executor that transfers step inputs to the devices and returns constant tokens, without running the model."""

    def __init__(self, programs: Programs, stopwatch: Stopwatch, steps: int) -> None:
        self.programs, self._stopwatch, self._steps = programs, stopwatch, steps
        self.weight_bytes = self.cache_bytes = 0
        self._sharding = NamedSharding(programs.decoder.placement.mesh, programs.decoder.rows_spec)

    def run(self, step_input: StepInput) -> tuple[Array, RowLogprobs | None]:
        with self._stopwatch.time("put"):
            jax.block_until_ready(self.programs.on_devices(step_input))
        with self._stopwatch.time("constant tokens"):
            return self._constant_tokens(step_input), None

    def _constant_tokens(self, step_input: StepInput) -> Array:
        counts = jnp.asarray(step_input.samples if step_input.limits is None else step_input.limits, jnp.int32)
        tokens = jnp.zeros((len(counts), self._steps), jnp.int32)
        emitted = SampledTokens(tokens, tokens.astype(jnp.float32), tokens[:, :0], tokens[:, :0], counts)
        return jax.block_until_ready(jax.device_put(emitted.pack(), self._sharding))


class TimedScheduler(Scheduler):
    """Scheduler that times its plans."""

    def __init__(self, limits: Limits, stopwatch: Stopwatch) -> None:
        super().__init__(limits)
        self._stopwatch = stopwatch

    def plan(self) -> Plan:
        with self._stopwatch.time("plan"):
            return super().plan()


class TimedEngine(Engine):
    """Engine that times dispatches and updates."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, sizes: Sizes, placement: Placement, stopwatch: Stopwatch
    ):
        super().__init__(scheduler, executor, sizes, placement)
        self._stopwatch = stopwatch

    def _dispatch(self, plan: Plan) -> InFlightStep:
        with self._stopwatch.time("build and put"):
            return super()._dispatch(plan)

    def _update_from_output(self, step: InFlightStep) -> None:
        with self._stopwatch.time("landing"):
            super()._update_from_output(step)


def measure(decoder: ShardedDecoder, options: Namespace, steps: int) -> dict[str, Any]:
    """Time of each part per decode step, while all requests decode."""
    stopwatch, programs = Stopwatch(), Programs(decoder)
    positions = 2 * PROMPT + steps * (options.repeats + options.requests)
    engine_options = Options(positions, options.requests, decode_steps=steps)
    sizes, shards = make_sizes(engine_options, decoder), decoder.placement.size(Role.TOKENS)
    limits = make_limits(
        engine_options, decoder, sizes, {window: sizes.needed_pages(window) for window in decoder.windows}
    )
    executor = InstantExecutor(programs, stopwatch, steps)
    engine = TimedEngine(TimedScheduler(limits, stopwatch), executor, sizes, decoder.placement, stopwatch)
    for number in range(options.requests):
        request = Request(number, range(number, number + PROMPT + number % PAGE), positions - 2 * PROMPT)
        engine.add(Generation(request, GREEDY, 0, frozenset(), None, OutputQueue()))
    while engine.stats.rows_per_shard != (sizes.slots,) * shards:
        engine.step()
    stopwatch.seconds.clear()
    for _ in range(options.repeats):
        with stopwatch.time("total"):
            engine.step()
    assert engine.stats.running == options.requests
    seconds = {part: np.array(each) / steps for part, each in stopwatch.seconds.items()}
    seconds["order"] = seconds["build and put"] - seconds["put"] - seconds["constant tokens"]
    seconds["total"] -= seconds["constant tokens"]
    return {part: Times(seconds[part]).as_dict() for part in PARTS}


def main() -> None:
    options, placement = script.begin(arguments(), QUICK)
    decoder = model.decoder(options, placement)
    print(f"{options.requests} decoding requests on {placement.size(Role.TOKENS)} token shards")
    table = script.Table({"steps of a dispatch": ">19", **{f"{name} ms": ">14" for name in PARTS.values()}})
    results = []
    for steps in options.decode_steps:
        found = measure(decoder, options, steps)
        table.row(steps, *(format_time(found[part]) for part in PARTS))
        results.append({"decode_steps": steps, **found})
    result = {"requests": options.requests, "results": results}
    script.finish("host", options, placement, result, partial(draw, results=results))


def arguments() -> ArgumentParser:
    parser = script.parser("host", "Host time of a decode step, without the devices.", repeats=200)
    parser.add_argument("--requests", type=script.positive, default=256, help="requests that decode at once")
    counts = script.several(script.positive)
    parser.add_argument("--decode-steps", type=counts, default=[1, 8], help="decode steps of a dispatch")
    return model.options(parser, layers=2, hidden=64, experts=8, width=32)


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    labels = [f"{result['decode_steps']} steps per dispatch" for result in results]
    script.bars(axes, labels, {name: [result[part] for result in results] for part, name in PARTS.items()})


if __name__ == "__main__":
    script.run(main)
