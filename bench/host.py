"""The host's part of a decode step, measured without the devices: they answer at once.

    plan       the scheduler's: who decodes, with which pages
    order      the plan written down as arrays
    put        these arrays brought to the devices that take them; `Programs.on_devices`, as it is
    landing    the results read, and the tokens given to their requests
    total      all of them

Times are those that a processor spends on the engine's thread, so that waiting for other work on the machine does not
count. One dispatch is several decode steps, which share them: all are milliseconds of a single decode step.

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
from bench.timing import Times, written
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Engine, Generation, Options, OutputQueue
from moe_jax.engine.engine import InFlightStep
from moe_jax.engine.executor import Executor
from moe_jax.engine.sizes import Sizes
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE, Programs, RowLogprobs, SampledTokens, StepInput
from moe_jax.scheduler import Limits, Plan, Request, Scheduler
from moe_jax.sharding import Placement, Role

QUICK = {"repeats": 3, "requests": 16}
PROMPT = 100
PARTS = ("plan", "order", "put", "landing", "total")
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class Watch:
    """The seconds of each part of a dispatch, one after the other."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.seconds[part].append(time.thread_time() - began)


class Instant(Executor):
    """Brings orders to the devices, and answers at once in their place, with arrays that lie there."""

    def __init__(self, programs: Programs, watch: Watch, steps: int) -> None:
        self.programs, self._watch, self._steps = programs, watch, steps
        self._sharding = NamedSharding(programs.decoder.placement.mesh, programs.decoder.rows_spec)

    def run(self, step_input: StepInput) -> tuple[Array, RowLogprobs | None]:
        with self._watch.time("put"):
            jax.block_until_ready(self.programs.on_devices(step_input))
        with self._watch.time("answer"):
            return self._answer(step_input), None

    def _answer(self, step_input: StepInput) -> Array:
        counts = jnp.asarray(step_input.samples if step_input.limits is None else step_input.limits, jnp.int32)
        tokens = jnp.zeros((len(counts), self._steps), jnp.int32)
        emitted = SampledTokens(tokens, tokens.astype(jnp.float32), tokens[:, :0], tokens[:, :0], counts)
        return jax.block_until_ready(jax.device_put(emitted.pack(), self._sharding))


class WatchedScheduler(Scheduler):
    def __init__(self, limits: Limits, watch: Watch) -> None:
        super().__init__(limits)
        self._watch = watch

    def plan(self) -> Plan:
        with self._watch.time("plan"):
            return super().plan()


class WatchedEngine(Engine):
    def __init__(self, scheduler: Scheduler, executor: Executor, sizes: Sizes, placement: Placement, watch: Watch):
        super().__init__(scheduler, executor, sizes, placement)
        self._watch = watch

    def _dispatch(self, plan: Plan) -> InFlightStep:
        with self._watch.time("order and put"):
            return super()._dispatch(plan)

    def _update_from_output(self, step: InFlightStep) -> None:
        with self._watch.time("landing"):
            super()._update_from_output(step)


def measure(decoder: ShardedDecoder, options: Namespace, steps: int) -> dict[str, Any]:
    """Milliseconds of each part, for one decode step, while as many requests decode as will."""
    watch, programs = Watch(), Programs(decoder)
    positions = 2 * PROMPT + steps * (options.repeats + options.requests)
    choices = Options(positions, options.requests, decode_steps=steps)
    sizes, shards = choices.sizes(decoder), decoder.placement.size(Role.TOKENS)
    limits = choices.limits(decoder, sizes, {window: sizes.needed_pages(window) for window in decoder.windows})
    executor = Instant(programs, watch, steps)
    engine = WatchedEngine(WatchedScheduler(limits, watch), executor, sizes, decoder.placement, watch)
    for number in range(options.requests):
        request = Request(number, range(number, number + PROMPT + number % PAGE), positions - 2 * PROMPT)
        engine.add(Generation(request, GREEDY, 0, frozenset(), None, OutputQueue()))
    while engine.stats.rows_per_shard != (sizes.slots,) * shards:
        engine.step()
    watch.seconds.clear()
    for _ in range(options.repeats):
        with watch.time("total"):
            engine.step()
    assert engine.stats.running == options.requests
    seconds = {part: np.array(each) / steps for part, each in watch.seconds.items()}
    seconds["order"] = seconds["order and put"] - seconds["put"] - seconds["answer"]
    seconds["total"] -= seconds["answer"]
    return {part: Times(seconds[part]).as_dict() for part in PARTS}


def main() -> None:
    options, placement = script.begin(arguments(), QUICK)
    decoder = model.decoder(options, placement)
    print(f"{options.requests} requests that decode, on {placement.size(Role.TOKENS)} token shards")
    table = script.Table({"steps of a dispatch": ">19", **{f"{part} ms": ">14" for part in PARTS}})
    results = []
    for steps in options.decode_steps:
        found = measure(decoder, options, steps)
        table.row(steps, *(written(found[part]) for part in PARTS))
        results.append({"decode_steps": steps, **found})
    result = {"requests": options.requests, "results": results}
    script.finish("host", options, placement, result, partial(draw, results=results))


def arguments() -> ArgumentParser:
    parser = script.parser("host", "The host's part of a decode step, the devices left out.", repeats=200)
    parser.add_argument("--requests", type=script.positive, default=256, help="that decode at once")
    counts = script.several(script.positive)
    parser.add_argument("--decode-steps", type=counts, default=[1, 8], help="of one dispatch")
    return model.options(parser, layers=2, hidden=64, experts=8, width=32)


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    labels = [f"{result['decode_steps']} steps a dispatch" for result in results]
    script.bars(axes, labels, {part: [result[part] for result in results] for part in PARTS})


if __name__ == "__main__":
    script.run(main)
