"""Time of the combine alone: scatter against reduce-and-slice, for bfloat16 rows without padding.

    rows   rows of all token shards (--rows: of each one)
    width  numbers in a row

python -m bench.combine [--mesh expert=8] [--rows 1,8] [--widths 1024] [--quick]; --help lists the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from bench import script
from bench.timing import Program, format_time, measure_programs
from moe_jax.sharding import Combine, Placement, ReduceCombine, Role, Rows, ScatterCombine

QUICK = {"repeats": 3, "rows": [2, 8], "widths": [64]}


def exchange(
    combine: Combine, rows: Rows, x: Array, *routing: Array, part: Callable[..., Float[Array, "N D"]]
) -> Float[Array, "T D"]:
    """Exchange rows as a feed-forward block does: gather, compute a `part` of the sum, combine."""
    gathered = combine.gather(rows, x, *routing)
    return combine.combine(gathered, gathered.partial_sum(part(*gathered.values)))


def program(combine: Combine, rows: Rows, gathered: int, width: int) -> Program:
    """Compile the combine of a buffer of `gathered` rows."""
    placement = combine.placement
    parts, tokens = (placement.spec((role,), (0,)) for role in (Role.PARTIAL, Role.TOKENS))

    def run(value: Float[Array, "N D"], rows: Rows) -> Float[Array, "T D"]:
        return exchange(combine, rows, value[: rows.capacity, :0], part=lambda _: value)

    mapped = jax.shard_map(run, mesh=placement.mesh, in_specs=(parts, PartitionSpec()), out_specs=tokens)
    value = jax.random.normal(jax.random.key(0), (placement.size(Role.PARTIAL) * gathered, width), jnp.bfloat16)
    placed = (
        jax.device_put(value, NamedSharding(placement.mesh, parts)),
        jax.device_put(rows, placement.sharding((), ())),
    )
    return Program.of(mapped, *placed)


def measure(placement: Placement, each: int, width: int, repeats: int) -> dict[str, Any]:
    """Time the combine with `each` rows on every token shard."""
    rows = Rows.of([each] * placement.size(Role.TOKENS), placement, capacity=each)
    gathered = each * placement.gather_shards
    strategies = {"scatter": ScatterCombine(placement), "reduce": ReduceCombine(placement, gathered)}
    programs = {name: program(strategy, rows, gathered, width) for name, strategy in strategies.items()}
    variants = measure_programs(programs, repeats)
    speedup = variants["reduce"]["ms"] / variants["scatter"]["ms"]
    total = each * placement.size(Role.TOKENS)
    return {"rows": total, "width": width, "variants": variants, "speedup": speedup}


def main() -> None:
    parser = script.parser("combine", "Time of the combine alone: scatter against reduce-and-slice.", repeats=30)
    parser.add_argument(
        "--rows", type=script.several(script.positive), default=[1, 8, 32, 128], help="rows of each token shard"
    )
    parser.add_argument("--widths", type=script.several(script.positive), default=[1024, 4096], help="numbers in a row")
    options, placement = script.begin(parser, QUICK)

    table = script.Table({"rows": ">6", "width": ">6", "scatter ms": ">16", "reduce ms": ">16", "speedup": ">8"})
    results = []
    for width in options.widths:
        for each in options.rows:
            results.append(result := measure(placement, each, width, options.repeats))
            cells = (format_time(result["variants"][name]) for name in ("scatter", "reduce"))
            table.row(result["rows"], width, *cells, f"{result['speedup']:.2f}")
    script.finish("combine", options, placement, {"results": results}, lambda axes: draw(axes, results))


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    """Plot milliseconds against rows, with a line for each variant and width."""
    for width in dict.fromkeys(result["width"] for result in results):
        for name, style in (("scatter", "o-"), ("reduce", "s--")):
            points = {r["rows"]: r["variants"][name] for r in results if r["width"] == width}
            medians, errors = zip(*((p["ms"], p["ms"] * p["spread"]) for p in points.values()), strict=True)
            axes.errorbar(list(points), medians, errors, fmt=style, capsize=3, label=f"{name}, width {width}")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="rows", ylabel="ms")


if __name__ == "__main__":
    script.run(main)
