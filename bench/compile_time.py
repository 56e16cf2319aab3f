"""Compile time of a decode step of Qwen3-30B-A3B at several depths, without weights.

python -m bench.compile_time [--mesh expert=8] [--depths 4,48] [--quick]; --help lists the rest.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from bench import script
from bench.published import config
from bench.timing import format_time, interleaved
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import Placement, Route, ScatterCombine

QUICK = {"repeats": 1, "depths": [1, 2]}
SLOTS, POSITIONS = 64, 2048


def compile_step(depth: int, placement: Placement) -> None:
    """Compile a decode step of the first `depth` layers."""
    full = config("Qwen3-30B-A3B")
    truncated = replace(full, layers=full.layers[:depth])
    programs = Programs(ShardedDecoder(truncated, placement, "bfloat16"))
    programs.decode_step(SLOTS, POSITIONS, Route.whole(ScatterCombine(placement)))


def main() -> None:
    parser = script.parser(
        "compile_time", "Compile time of a decode step of Qwen3-30B-A3B at several depths.", repeats=5
    )
    parser.add_argument("--depths", type=script.several(script.positive), default=[4, 48], help="numbers of layers")
    options, placement = script.begin(parser, QUICK)

    times = interleaved({str(d): partial(compile_step, d, placement) for d in options.depths}, options.repeats)
    table = script.Table({"layers": ">6", "compile ms": ">16", "ratio": ">6"})
    results = []
    for depth, found in zip(options.depths, times.values(), strict=True):
        ratio = found.median / times[str(options.depths[0])].median
        results.append({"layers": depth, **found.as_dict(), "ratio": ratio})
        table.row(depth, format_time(results[-1]), f"{ratio:.2f}")
    script.finish("compile_time", options, placement, {"results": results}, lambda axes: draw(axes, results))


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    script.bars(axes, [f"{result['layers']} layers" for result in results], {"compile": results})


if __name__ == "__main__":
    script.run(main)
