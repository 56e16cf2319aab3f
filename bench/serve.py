"""Requests that come by chance, served in three ways by one engine: continuous batching beside static batches.

    static       a batch of those that wait, as many as there are slots, all decoded until the longest has ended
    shrinking    the same, but each of them is decoded to its own end only, and steps get smaller: a static batch that
                 has all else that the engine does
    continuous   each joins as soon as there is a slot: the engine as it is

Lengths of prompts and outputs are drawn from log-normal laws, outputs twice as long as prompts, which is as in
conversations (Kwon et al., arXiv:2309.06180, of ShareGPT). All ways run the same compiled programs, over the same
arrivals, in turn; nothing is compiled while they do. Tokens beyond a request's own count for nothing.

    tokens/s     output tokens over the time from the first arrival to the last token
    first        from the arrival of a request to its first token, whether it waits in the engine or before it
    between      from one token to the next; tokens that come together share the time since the last
    pad share    of the rows that steps took time for; `balance` is mean over largest rows of a token shard

python -m bench.serve [--rate inf] [--requests 128] [--slots 16] [--model DIR] [--quick]; --help lists the rest.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bench import model, script
from bench.timing import Times
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Engine, Generation, Options, OutputQueue, Stats
from moe_jax.engine.distributed import SingleProcess
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs, StepFlags
from moe_jax.scheduler import Request
from moe_jax.sharding import as_hardware

QUICK = {
    "repeats": 2, "requests": 24, "slots": 8, "positions": 64, "prompt": 4, "output": 4, "prefill": 16,
    "layers": 2, "hidden": 32, "experts": 8, "width": 16,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
PERCENTS = (50, 90, 99)


class Arrival(NamedTuple):
    seconds: float
    """After the first."""
    prompt: list[int]
    tokens: int
    """To generate, exactly."""


@dataclass
class Pass:
    """All arrivals, served once."""

    first: list[float] = field(default_factory=list)
    """Seconds from each request's arrival to its first token."""
    between: list[float] = field(default_factory=list)
    """Seconds before each token but the first."""
    curve: list[tuple[float, int]] = field(default_factory=list)
    """After each dispatch, the seconds, and the tokens so far."""
    outputs: dict[int, list[int]] = field(default_factory=dict)
    """The tokens of each request."""
    cache_use: float = 0.0
    """At its highest."""
    stats: Stats | None = None


def arrivals(options: Namespace, vocab: int) -> list[Arrival]:
    random = np.random.default_rng(options.seed)

    def lengths(median: int, largest: np.ndarray | int) -> np.ndarray:
        emitted = random.lognormal(np.log(median), options.tail, options.requests)
        return np.clip(np.rint(emitted), 1, largest).astype(int)

    came = np.cumsum(random.exponential(1 / options.rate, options.requests))
    prompts = lengths(options.prompt, options.positions // 2)
    tokens = lengths(options.output, options.positions - prompts + 1)
    return [
        Arrival(seconds, random.integers(vocab, size=prompt).tolist(), count)
        for seconds, prompt, count in zip((came - came[0]).tolist(), prompts.tolist(), tokens.tolist(), strict=True)
    ]


class Way(NamedTuple):
    joins: Callable[[Engine, int], int]
    """How many requests may join now, of an engine with so many slots."""
    tokens: Callable[[Sequence[Arrival]], list[int]]
    """How many tokens each of those that join together is decoded for."""


def next_batch(engine: Engine, slots: int) -> int:
    return 0 if engine.has_work else slots


def everyone(engine: Engine, slots: int) -> int:
    """Those that cannot run yet wait in the engine."""
    return sys.maxsize


def longest(batch: Sequence[Arrival]) -> list[int]:
    return [max(arrival.tokens for arrival in batch)] * len(batch) if batch else []


def own(batch: Sequence[Arrival]) -> list[int]:
    return [arrival.tokens for arrival in batch]


WAYS = {"static": Way(next_batch, longest), "shrinking": Way(next_batch, own), "continuous": Way(everyone, own)}


def serve(engine: Engine, coming: Sequence[Arrival], way: Way, options: Namespace) -> Pass:
    done, queue = Pass(), OutputQueue()
    heard = {number: arrival.seconds for number, arrival in enumerate(coming)}
    came = admitted = tokens = 0
    began = time.perf_counter()
    while len(done.outputs) < len(coming) or engine.has_work:
        now = time.perf_counter() - began
        while came < len(coming) and coming[came].seconds <= now:
            came += 1
        batch = coming[admitted : min(came, admitted + way.joins(engine, options.slots))]
        for number, (arrival, tokens_each) in enumerate(zip(batch, way.tokens(batch), strict=True), admitted):
            max_tokens = min(tokens_each, options.positions - len(arrival.prompt) + 1)
            engine.add(Generation(Request(number, arrival.prompt, max_tokens), GREEDY, 0, frozenset(), None, queue))
        admitted += len(batch)
        if not engine.has_work:
            time.sleep(coming[came].seconds - now)
            continue
        engine.step()
        now = time.perf_counter() - began
        done.cache_use = max(done.cache_use, engine.stats.cache_use)
        for generation in queue.read():
            tokens += _hear(generation, coming, now, heard, done)
        done.curve.append((now, tokens))
    done.stats = engine.stats
    return done


def _hear(generation: Generation, coming: Sequence[Arrival], now: float, heard: dict[int, float], done: Pass) -> int:
    """Take down what is new; how many tokens of the request's own these are."""
    assert generation.error is None
    number = generation.request.id
    assert isinstance(number, int)
    if number in done.outputs:
        return 0
    before, _ = generation.emitted
    generation.count_new()
    tokens = generation.tokens[: coming[number].tokens]
    count = len(tokens) - before
    if before:
        done.between += [(now - heard[number]) / count] * count
    else:
        done.first.append(now - heard[number])
    heard[number] = now
    if len(tokens) == coming[number].tokens:
        done.outputs[number] = tokens
    return count


def measure(decoder: ShardedDecoder, options: Namespace) -> tuple[dict[str, Any], dict[str, list[Pass]]]:
    sizes = Options(options.positions, options.slots, options.prefill, options.decode_steps)
    programs, parameters = Programs(decoder), decoder.init(seed=0)
    policy = decoder.policy(as_hardware(None), "auto", "auto", "exact")
    sizes.engine(programs, parameters, policy, SingleProcess()).warm_up([StepFlags()], progress=True)
    compiled, coming = programs.compilations, arrivals(options, decoder.config.vocab_size)
    passes: dict[str, list[Pass]] = {name: [] for name in WAYS}
    for number in range(options.repeats + 1):  # the first warms up
        for name, way in WAYS.items():
            engine = sizes.engine(programs, parameters, policy, SingleProcess())
            done = serve(engine, coming, way, options)
            if number:
                passes[name].append(done)
    assert programs.compilations == compiled, "nothing is compiled while it is timed"
    return {
        "requests": len(coming),
        "prompt_tokens": sum(len(arrival.prompt) for arrival in coming),
        "output_tokens": sum(arrival.tokens for arrival in coming),
        "longest_output": max(arrival.tokens for arrival in coming),
        "programs": compiled,
        "variants": {name: summary(several) for name, several in passes.items()},
        "speedup": {name: speedup(several, passes["continuous"]) for name, several in passes.items()},
        "different_requests": different(passes),
    }, passes


def summary(passes: Sequence[Pass]) -> dict[str, Any]:
    """The makespan, and what goes with it, at the median pass; latencies of all passes together."""
    makespan = Times(np.array([done.curve[-1][0] for done in passes]))
    stats = passes[-1].stats
    assert stats is not None
    return {
        "makespan": makespan.as_dict(),
        "tokens_per_second": passes[0].curve[-1][1] / makespan.median,
        "requests_per_second": len(passes[0].outputs) / makespan.median,
        "first_token_ms": percentiles([seconds for done in passes for seconds in done.first]),
        "between_tokens_ms": percentiles([seconds for done in passes for seconds in done.between]),
        "dispatches": len(passes[-1].curve),
        "balance": stats.balance,
        "pad_share": stats.pad_share,
        "cache_use": passes[-1].cache_use,
        "preemptions": stats.preemptions,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return dict(zip((f"p{percent}" for percent in PERCENTS), np.percentile(seconds, PERCENTS) * 1e3, strict=True))


def speedup(others: Sequence[Pass], continuous: Sequence[Pass]) -> Mapping[str, float]:
    """How many times the tokens/s, of passes one after the other."""
    pairs = zip(others, continuous, strict=True)
    ratios = sorted(slow.curve[-1][0] / fast.curve[-1][0] for slow, fast in pairs)
    return {"median": float(np.median(ratios)), "lowest": ratios[0], "highest": ratios[-1]}


def different(passes: Mapping[str, Sequence[Pass]]) -> int:
    """Requests that got other tokens one way than another."""
    ways = [several[-1].outputs for several in passes.values()]
    return sum(any(outputs[number] != tokens for outputs in ways) for number, tokens in ways[0].items())


def show(result: Mapping[str, Any]) -> None:
    """A column for each variant."""
    variants = result["variants"].values()
    table = script.Table({"": "<28", **dict.fromkeys(result["variants"], ">20")})
    table.row("tokens/s", *(f"{variant['tokens_per_second']:.0f}" for variant in variants))
    table.row("requests/s", *(f"{variant['requests_per_second']:.2f}" for variant in variants))
    for name in ("first_token_ms", "between_tokens_ms"):
        cells = (" / ".join(f"{value:.0f}" for value in variant[name].values()) for variant in variants)
        table.row(f"{name[:-3].replace('_', ' ')}, ms p50/90/99", *cells)
    for name in ("dispatches", "preemptions"):
        table.row(name, *(variant[name] for variant in variants))
    table.row("balance of rows", *(f"{variant['balance']:.2f}" for variant in variants))
    table.row("pad share", *(f"{variant['pad_share']:.0%}" for variant in variants))
    table.row("cache use, highest", *(f"{variant['cache_use']:.0%}" for variant in variants))


def main() -> None:
    options, placement = script.begin(arguments(), QUICK)
    measured, passes = measure(model.decoder(options, placement), options)
    flags = {name: getattr(options, name) for name in ("dtype", "slots", "positions", "decode_steps", "prefill")}
    result = {"model": str(options.model or "synthetic"), "rate": str(options.rate), **flags, **measured}
    print(
        f"{result['requests']} requests, {options.rate} a second, {result['prompt_tokens']} tokens of prompts, "
        f"{result['output_tokens']} of outputs, the longest {result['longest_output']}; "
        f"{options.slots} slots; {result['programs']} programs"
    )
    show(result)
    for name in ("static", "shrinking"):
        ratio = result["speedup"][name]
        print(f"continuous batching gives {ratio['median']:.2f} times the tokens/s of {name} batches ", end="")
        print(f"({ratio['lowest']:.2f} to {ratio['highest']:.2f} in {options.repeats} pairs of passes)")
    print(f"{result['different_requests']} requests got other tokens one way than another")
    script.finish("serve", options, placement, result, partial(draw, passes=passes))


def arguments() -> ArgumentParser:
    parser = script.parser("serve", "Serves requests: continuous batching beside static batches.", repeats=3)
    parser.add_argument("--requests", type=script.positive, default=256)
    parser.add_argument(
        "--rate", type=script.above_zero, default="inf", help="requests a second; inf: all come at once"
    )
    parser.add_argument("--slots", type=script.positive, default=64, help="requests that are decoded together")
    parser.add_argument("--positions", type=script.above_one, default=256, help="of a sequence, at most")
    parser.add_argument("--prompt", type=script.positive, default=16, help="median tokens of a prompt")
    parser.add_argument("--output", type=script.positive, default=32, help="median tokens of an output")
    parser.add_argument(
        "--tail", type=script.above_zero, default=1.0, help="standard deviation of the logarithms of lengths"
    )
    parser.add_argument("--prefill", type=script.positive, default=128, help="prompt tokens of a shard in one step")
    parser.add_argument("--decode-steps", type=script.positive, default=8, help="of one dispatch")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    return model.options(parser, layers=2, hidden=128, experts=16, width=64)


def draw(axes: script.Axes, passes: Mapping[str, Sequence[Pass]]) -> None:
    """How far each variant has come at each time, in its last pass."""
    for name, several in passes.items():
        axes.plot(*zip(*several[-1].curve, strict=True), label=name)
    axes.set_xlabel("seconds")
    axes.set_ylabel("output tokens")


if __name__ == "__main__":
    script.run(main)
