"""Profile of a decode step of a model with random weights: reduce-and-slice against scatter.

    sent        bytes that each device sends, by ring algorithms, for the collectives of the compiled program
    collective  time of a program with little else than the collectives of the step's feed-forward blocks; it is not
                timed if its collectives or bytes differ from theirs
    compute     time of the step minus `collective`, as if they did not overlap
    step        time of the compiled step, with its inputs on the devices; tokens/s follow from it

python -m bench.decode [--mesh expert=8] [--model DIR] [--sequences 8] [--trace DIR] [--quick]; --help lists the rest.
With --against transformers, whole generations on one device are compared instead: see `bench.against`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import against, model, script
from bench.step import SCOPES, DecodeProgram, step_inputs
from bench.timing import format_time, interleaved
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import ReduceCombine, Role, Rows, ScatterCombine

QUICK = {"repeats": 3, "sequences": 2, "positions": 8, "layers": 2, "hidden": 32, "experts": 8, "width": 16}
STRATEGIES = {"reduce": ReduceCombine, "scatter": ScatterCombine}
KINDS = ("all-reduce", "reduce-scatter", "all-gather")
TRACED_STEPS = 3


def measure(decoder: ShardedDecoder, options: Namespace) -> dict[str, Any]:
    """Run and time both strategies on the same inputs."""
    placement, parameters = decoder.placement, decoder.init(seed=0)
    steps = 1 + options.repeats + (TRACED_STEPS if options.trace else 0)
    positions = max(steps, options.positions)
    inputs = step_inputs(decoder, options.sequences, positions, steps)
    counts = [options.sequences] * placement.size(Role.TOKENS)
    sized = {name: strategy.sized(placement, counts, options.sequences) for name, strategy in STRATEGIES.items()}
    rows = Rows.of(counts, placement, options.sequences)
    decodes = {
        name: DecodeProgram(decoder, parameters, inputs, rows, positions, combine) for name, combine in sized.items()
    }
    alone = {
        f"{name} alone": decode.collectives_alone for name, decode in decodes.items() if decode.has_same_collectives
    }
    times = interleaved({**decodes, **alone}, options.repeats)
    if options.trace:
        trace(decodes, options.trace)
    reduced, scattered = (np.array(decode.tokens) for decode in decodes.values())
    return {
        "sequences": sum(counts),
        "steps": steps,
        "variants": {name: decode.profile(times[name], times.get(f"{name} alone")) for name, decode in decodes.items()},
        "different_tokens": int(np.sum(reduced != scattered)),
        "scopes": [scope for scope in SCOPES if all(scope in decode.scopes for decode in decodes.values())],
    }


def trace(decodes: Mapping[str, DecodeProgram], directory: Path) -> None:
    """Write a profiler trace of a few steps of each variant."""
    with jax.profiler.trace(str(directory)):
        for number in range(TRACED_STEPS):
            for name, decode in decodes.items():
                with jax.profiler.StepTraceAnnotation(name, step_num=number):
                    jax.block_until_ready(decode())


def show(result: Mapping[str, Any]) -> None:
    """Print a table with a column for each variant."""
    variants = result["variants"].values()
    table = script.Table({"per step": "<32", **dict.fromkeys(result["variants"], ">16")})
    for kind in KINDS:
        table.row(kind, *(variant["collectives"].get(kind, 0) for variant in variants))
    table.row("of them outside feed-forwards", *(variant["outside"] for variant in variants))
    table.row("KiB sent by each device", *(f"{variant['sent_bytes'] / 1024:.1f}" for variant in variants))
    alone = (variant["collective"] for variant in variants)
    table.row("gather and combine alone, ms", *(format_time(times) if times else "-" for times in alone))
    ratios = (variant["collective_to_compute"] for variant in variants)
    table.row("collective/compute ratio", *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    table.row("step, ms", *(format_time(variant["step"]) for variant in variants))
    table.row("tokens/s", *(f"{variant['tokens_per_second']:.0f}" for variant in variants))


def main() -> None:
    parser = arguments()
    if parser.parse_args().against:
        parser.set_defaults(cpu_devices=1, repeats=5)
    options, placement = script.begin(parser, QUICK)
    if options.against:
        if (result := against.main(options, placement)) is not None:
            script.finish("decode", options, placement, result, lambda axes: against.draw(axes, result["results"]))
        return
    if options.trace:
        options.trace.mkdir(parents=True, exist_ok=True)
    decoder = model.decoder(options, placement)
    result = {"model": str(options.model or "synthetic"), "dtype": options.dtype, **measure(decoder, options)}
    show(result)
    differ = result["different_tokens"]
    generated = f"{result['steps']} steps of {result['sequences']} sequences, {options.dtype}"
    print(f"tokens  {differ} differ between the two" if differ else "tokens  the same in both", f"({generated})")
    if options.trace:
        print(f"trace   written to {options.trace}, with the scopes {', '.join(result['scopes'])}")
    script.finish("decode", options, placement, result, lambda axes: draw(axes, result["variants"]))
    if differ and options.dtype == "float32":
        sys.exit("error: both must generate the same tokens in float32")


def arguments() -> ArgumentParser:
    parser = script.parser("decode", "Profile of a decode step: reduce-and-slice against scatter.", repeats=30)
    parser.add_argument("--sequences", type=script.positive, default=8, help="sequences on each token shard")
    parser.add_argument("--positions", type=script.positive, default=128, help="positions of the KV caches, at least")
    parser.add_argument("--against", choices=["transformers"], help="program to compare with on one device")
    batches = {"type": script.several(script.positive), "default": [1, 32]}
    parser.add_argument("--batches", **batches, help="numbers of sequences, under --against")
    parser.add_argument(
        "--trace", type=Path, metavar="DIR", help="write a jax.profiler trace of a few more steps to this directory"
    )
    return model.options(parser, layers=4, hidden=256, experts=32, width=128)


def draw(axes: script.Axes, variants: Mapping[str, Any]) -> None:
    """Draw the time of the step of each variant, and of gather and combine alone if they were timed."""
    times = {"step": [variant["step"] for variant in variants.values()]}
    alone = [variant["collective"] for variant in variants.values()]
    script.bars(axes, list(variants), times | ({"gather and combine alone": alone} if all(alone) else {}))


if __name__ == "__main__":
    script.run(main)
