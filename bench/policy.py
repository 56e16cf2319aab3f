"""Where the policy is wrong: every strategy timed over a grid, beside what the policy chooses by its hardware record.

    rows    real ones of all token shards
    skew    how they lie on the shards: even, mild (one has a third more, another less), heavy (most on one), idle
            (every other shard has none)

Timed is what moves rows: dispatch, one pass over the buffer for the experts, combine.

python -m bench.policy [--hardware FILE] [--shards 2,4,8] [--rows 8,64] [--quick]; --help lists the rest.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from bench import script
from bench.timing import Program, interleaved
from moe_jax.analysis.explain import evenly
from moe_jax.sharding import Combine, Hardware, Placement, Policy, Role, RowBytes, Rows, as_hardware, make_mesh
from moe_jax.sharding.policy import STRATEGIES

QUICK = {"repeats": 2, "shards": [2], "rows": [8], "hidden": [64]}
TOP_K, HELD, DTYPE = 4, 4, "bfloat16"
COPIES = 8
"""Of the gathered rows that a program holds at once, about."""
FEW, OFTENER = 64, 4
"""So few rows are timed so many times as often, for noise is most of what they take."""
NEAR = 1.15
"""A choice is right if it takes at most so many times what the best strategy takes."""


def mild(rows: int, shards: int) -> list[int]:
    first, second, *others = evenly(rows, shards)
    return [first + first // 3, second - first // 3, *others]


def heavy(rows: int, shards: int) -> list[int]:
    return [rows - (shards - 1) * (rows // 64), *[rows // 64] * (shards - 1)]


def idle(rows: int, shards: int) -> list[int]:
    return [count for some in evenly(rows, (shards + 1) // 2) for count in (some, 0)][:shards]


SKEWS: dict[str, Callable[[int, int], list[int]]] = {"even": evenly, "mild": mild, "heavy": heavy, "idle": idle}


def program(combine: Combine, rows: Rows, hidden: int) -> Program:
    here = combine.placement
    tokens, experts = here.spec((Role.TOKENS,), (0,)), HELD * here.size(Role.EXPERTS)

    def run(x: Float[Array, "T D"], scale: Float[Array, "1"], rows: Rows) -> Float[Array, "T D"]:
        valid = rows.valid(here)
        scores = jax.random.uniform(jax.random.key(0), (x.shape[0], experts)) * scale
        weights, chosen = jax.lax.top_k(scores, TOP_K)
        assert valid is not None
        chosen = jnp.where(valid[:, None], chosen, experts)
        gathered = combine.dispatch(rows, x, chosen, weights, HELD)
        everyone, _, weights = gathered.values
        part = everyone * (weights[:, :1] * scale).astype(x.dtype)
        return combine.combine(gathered, gathered.partial_sum(part))

    mapped = jax.shard_map(run, mesh=here.mesh, in_specs=(tokens, tokens, here.spec((), ())), out_specs=tokens)
    shards = here.size(Role.TOKENS)
    place = NamedSharding(here.mesh, tokens)
    x, scale = jnp.ones((shards * rows.capacity, hidden), DTYPE, device=place), jnp.ones(shards, device=place)
    return Program.of(mapped, x, scale, jax.device_put(rows, here.sharding((), ())))


def measure(placement: Placement, counts: list[int], hidden: int, hardware: Hardware, repeats: int) -> dict[str, Any]:
    rows = Rows.of(counts, placement)
    policy = Policy(placement, (RowBytes.of(hidden, DTYPE, top_k=TOP_K),), hardware)
    sized = {name: strategy.sized(placement, counts, rows.capacity) for name, strategy in STRATEGIES.items()}
    chosen = policy.decide(counts, rows.capacity).route.combine
    programs = {name: program(combine, rows, hidden) for name, combine in sized.items()}
    alike = {name: next(other for other in programs if same(programs[other], programs[name])) for name in programs}
    timed = interleaved({name: programs[name] for name in set(alike.values())}, repeats)
    times = {name: timed[alike[name]] for name in programs}
    (name,) = (name for name, combine in sized.items() if combine == chosen)
    best = min(times, key=lambda name: times[name].median)
    return {
        "ms": {name: time.median * 1e3 for name, time in times.items()},
        "chosen": name,
        "best": best,
        "times_best": times[name].median / times[best].median,
    }


def same(one: Program, other: Program) -> bool:
    """Whether two strategies came to one program, as a ragged combine with no base is a reduction."""
    return instructions(one) == instructions(other)


def instructions(program: Program) -> list[str]:
    lines = (program.compiled.as_text() or "").splitlines()
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines if " = " in line]


def grid(options: Namespace, hardware: Hardware) -> Iterator[dict[str, Any]]:
    for shards, hidden, rows, skew in product(options.shards, options.hidden, options.rows, SKEWS):
        placement = Placement(make_mesh({"expert": shards}, jax.devices()[:shards]))
        counts = SKEWS[skew](rows, shards)
        cell = {"shards": shards, "hidden": hidden, "rows": rows, "skew": skew}
        buffer = Rows.of(counts, placement).capacity * shards * hidden * jnp.dtype(DTYPE).itemsize
        if COPIES * buffer * hardware.sharers(placement) > hardware.memory:
            print(f"left out, for its buffers would not fit in memory: {cell}")
            continue
        repeats = options.repeats * (1 if rows > FEW else OFTENER)
        yield cell | measure(placement, counts, hidden, hardware, repeats)


def main() -> None:
    parser = arguments()
    options, placement = script.begin(parser, QUICK)
    if options.mesh:
        parser.error("every cell makes its own mesh: give --shards in place of --mesh")
    hardware = as_hardware(options.hardware)
    print(f"reckoned with {hardware.name}: {hardware.source}")
    columns = {"shards": ">6", "hidden": ">6", "rows": ">6", "skew": ">6"}
    times = {f"{name} ms": ">13" for name in STRATEGIES}
    table = script.Table(columns | times | {"chosen": ">11", "x best": ">7"})
    results = []
    for cell in grid(options, hardware):
        results.append(cell)
        measured = (f"{ms:.2f}" for ms in cell["ms"].values())
        table.row(*(cell[name] for name in columns), *measured, cell["chosen"], f"{cell['times_best']:.2f}")
    if not results:
        parser.error("no cell fits in memory: give fewer --rows or a smaller --hidden")
    right = sum(cell["times_best"] <= NEAR for cell in results) / len(results)
    always = {
        name: sum(c["ms"][name] <= NEAR * min(c["ms"].values()) for c in results) / len(results) for name in STRATEGIES
    }
    print(
        f"within {NEAR - 1:.0%} of the best: the policy in {right:.0%} of {len(results)} cells; "
        + ", ".join(f"always {name} {share:.0%}" for name, share in always.items())
    )
    shares = {"right": right, "always": always}
    script.finish("policy", options, placement, {**shares, "results": results}, partial(draw, results=results))


def arguments() -> ArgumentParser:
    parser = script.parser("policy", "Times every strategy over a grid, beside what the policy chooses.", repeats=9)
    parser.add_argument("--hardware", help="a name, or a file that moe-jax bench --calibrate wrote")
    parser.add_argument("--shards", type=script.several(script.above_one), default=[2, 4, 8])
    parser.add_argument("--rows", type=script.several(script.positive), default=[8, 64, 512, 4096])
    parser.add_argument("--hidden", type=script.several(script.positive), default=[1024, 8192])
    return parser


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    """How many times the best strategy's time each takes, over all cells, sorted."""
    for name in ("policy", *STRATEGIES):
        taken = [cell["chosen"] if name == "policy" else name for cell in results]
        ratios = [c["ms"][one] / min(c["ms"].values()) for c, one in zip(results, taken, strict=True)]
        axes.plot(sorted(ratios), label=name)
    axes.set(yscale="log", xlabel="cells, sorted", ylabel="times the best")


if __name__ == "__main__":
    script.run(main)
