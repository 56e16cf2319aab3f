"""Serving speed of continuous batching against static batches, for requests that arrive at random.

    static       a batch takes up to one waiting request per slot and decodes all of them until the longest has ended
    shrinking    a static batch in which requests end at their own lengths, so that its steps get smaller
    continuous   a request joins as soon as a slot is free: the engine as it is

Lengths of prompts and outputs have log-normal distributions, with outputs twice as long as prompts, as in conversations
(ShareGPT in Kwon et al., arXiv:2309.06180). All variants run the same compiled programs on the same arrivals,
interleaved; nothing is compiled meanwhile. Tokens beyond the length of a request do not count.

    tokens/s        output tokens over the time from the first arrival to the last token
    first token     time from the arrival of a request to its first token, waiting included
    between tokens  time from one token to the next; tokens of one dispatch share the time since the dispatch before
    pad share       share of padding among the rows of steps
    balance         mean over largest number of rows of a token shard

python -m bench.serve [--rate inf] [--requests 128] [--slots 16] [--model DIR] [--quick]; --help lists the rest.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import model, script
from bench.serving import BATCHINGS, ServingRun, arrivals, serve
from bench.timing import Times
from moe_jax.engine import Options, make_engine, plan_cache
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs, StepFlags
from moe_jax.sharding import as_hardware, free_memory

QUICK = {
    "repeats": 2, "requests": 24, "slots": 8, "positions": 64, "prompt": 4, "output": 4, "prefill": 16,
    "layers": 2, "hidden": 32, "experts": 8, "width": 16,
}  # fmt: skip
PERCENTS = (50, 90, 99)


def measure(decoder: ShardedDecoder, options: Namespace) -> tuple[dict[str, Any], dict[str, list[ServingRun]]]:
    """Serve the same arrivals with each batching, interleaved; return the results and the runs."""
    engine_options = Options(options.positions, options.slots, options.prefill, options.decode_steps)
    programs, parameters = Programs(decoder), decoder.init(seed=0)
    policy = decoder.policy(as_hardware(None), "auto", "auto", "exact")
    cache = plan_cache(engine_options, decoder, free_memory(decoder.placement))
    make_engine(engine_options, cache, programs, parameters, policy).warm_up([StepFlags()], progress=True)
    compiled, requests = programs.compilations, arrivals(options, decoder.config.vocab_size)
    runs: dict[str, list[ServingRun]] = {name: [] for name in BATCHINGS}
    for repeat in range(options.repeats + 1):  # the first one warms up
        for name, batching in BATCHINGS.items():
            engine = make_engine(engine_options, cache, programs, parameters, policy)
            done = serve(engine, requests, batching, options)
            if repeat:
                runs[name].append(done)
    assert programs.compilations == compiled, "a program was compiled during a timed run"
    return {
        "requests": len(requests),
        "prompt_tokens": sum(len(arrival.prompt) for arrival in requests),
        "output_tokens": sum(arrival.tokens for arrival in requests),
        "longest_output": max(arrival.tokens for arrival in requests),
        "programs": compiled,
        "variants": {name: summary(several) for name, several in runs.items()},
        "speedup": {name: speedup(several, runs["continuous"]) for name, several in runs.items()},
        "different_requests": different(runs),
    }, runs


def summary(runs: Sequence[ServingRun]) -> dict[str, Any]:
    """Throughput at the median makespan, latencies of all runs together, and statistics of the last run."""
    makespan = Times(np.array([done.curve[-1][0] for done in runs]))
    stats = runs[-1].stats
    assert stats is not None
    return {
        "makespan": makespan.as_dict(),
        "tokens_per_second": runs[0].curve[-1][1] / makespan.median,
        "requests_per_second": len(runs[0].outputs) / makespan.median,
        "first_token_ms": percentiles([seconds for done in runs for seconds in done.first]),
        "between_tokens_ms": percentiles([seconds for done in runs for seconds in done.between]),
        "dispatches": len(runs[-1].curve),
        "balance": stats.balance,
        "pad_share": stats.pad_share,
        "cache_use": runs[-1].cache_use,
        "preemptions": stats.preemptions,
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return dict(zip((f"p{percent}" for percent in PERCENTS), np.percentile(seconds, PERCENTS) * 1e3, strict=True))


def speedup(others: Sequence[ServingRun], continuous: Sequence[ServingRun]) -> Mapping[str, float]:
    """Ratio of tokens/s of continuous batching to the other, for pairs of consecutive runs."""
    pairs = zip(others, continuous, strict=True)
    ratios = sorted(slow.curve[-1][0] / fast.curve[-1][0] for slow, fast in pairs)
    return {"median": float(np.median(ratios)), "lowest": ratios[0], "highest": ratios[-1]}


def different(runs: Mapping[str, Sequence[ServingRun]]) -> int:
    """Number of requests whose tokens differ between batchings."""
    all_outputs = [several[-1].outputs for several in runs.values()]
    return sum(any(outputs[number] != tokens for outputs in all_outputs) for number, tokens in all_outputs[0].items())


def show(result: Mapping[str, Any]) -> None:
    """Print a table with a column for each variant."""
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
    table.row("largest cache use", *(f"{variant['cache_use']:.0%}" for variant in variants))


def main() -> None:
    options, placement = script.begin(arguments(), QUICK)
    measured, runs = measure(model.decoder(options, placement), options)
    settings = {name: getattr(options, name) for name in ("dtype", "slots", "positions", "decode_steps", "prefill")}
    result = {"model": str(options.model or "synthetic"), "rate": str(options.rate), **settings, **measured}
    print(
        f"{result['requests']} requests, {options.rate} per second, {result['prompt_tokens']} prompt tokens, "
        f"{result['output_tokens']} output tokens, the longest output {result['longest_output']}; "
        f"{options.slots} slots; {result['programs']} programs"
    )
    show(result)
    for name in ("static", "shrinking"):
        ratio = result["speedup"][name]
        print(f"continuous batching gives {ratio['median']:.2f} times the tokens/s of {name} batches ", end="")
        print(f"({ratio['lowest']:.2f} to {ratio['highest']:.2f} in {options.repeats} pairs of runs)")
    print(f"{result['different_requests']} requests got different tokens from different batchings")
    script.finish("serve", options, placement, result, partial(draw, runs=runs))


def arguments() -> ArgumentParser:
    parser = script.parser("serve", "Serving speed of continuous batching against static batches.", repeats=3)
    parser.add_argument("--requests", type=script.positive, default=256, help="number of requests")
    parser.add_argument(
        "--rate", type=script.above_zero, default="inf", help="requests per second; inf: all arrive at once"
    )
    parser.add_argument("--slots", type=script.positive, default=64, help="requests that decode together")
    parser.add_argument(
        "--positions", type=script.above_one, default=256, help="largest number of positions of a sequence"
    )
    parser.add_argument("--prompt", type=script.positive, default=16, help="median number of tokens of a prompt")
    parser.add_argument("--output", type=script.positive, default=32, help="median number of tokens of an output")
    parser.add_argument(
        "--tail", type=script.above_zero, default=1.0, help="standard deviation of the logarithms of lengths"
    )
    parser.add_argument(
        "--prefill", type=script.positive, default=128, help="prompt tokens of a token shard in one step"
    )
    parser.add_argument("--decode-steps", type=script.positive, default=8, help="decode steps of a dispatch")
    parser.add_argument("--seed", type=int, default=0, help="seed of arrivals and lengths")
    return model.options(parser, layers=2, hidden=128, experts=16, width=64)


def draw(axes: script.Axes, runs: Mapping[str, Sequence[ServingRun]]) -> None:
    """Plot output tokens against time, for the last run of each variant."""
    for name, several in runs.items():
        axes.plot(*zip(*several[-1].curve, strict=True), label=name)
    axes.set_xlabel("seconds")
    axes.set_ylabel("output tokens")


if __name__ == "__main__":
    script.run(main)
