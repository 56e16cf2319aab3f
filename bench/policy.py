"""Accuracy of the policy: time of every strategy over a grid of cases, against the strategy that the policy chooses.

    rows    rows of all token shards, without padding
    skew    spread of the rows over the shards: even, mild (one has a third more, another a third less), heavy (most on
            one), idle (every other shard has none)

The timed program moves rows: dispatch, one pass over the buffer in place of the experts, combine.

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
TOP_K, EXPERTS_EACH, DTYPE = 4, 4, "bfloat16"
COPIES = 8
"""Estimated number of copies of the gathered rows that a program holds at once."""
FEW_ROWS, EXTRA_REPEATS = 64, 4
"""Cases with at most `FEW_ROWS` rows get `EXTRA_REPEATS` times the repeats, as their times are mostly noise."""
TOLERANCE = 1.15
"""Largest time of a right choice, relative to the best strategy."""


def mild(rows: int, shards: int) -> list[int]:
    first, second, *others = evenly(rows, shards)
    return [first + first // 3, second - first // 3, *others]


def heavy(rows: int, shards: int) -> list[int]:
    return [rows - (shards - 1) * (rows // 64), *[rows // 64] * (shards - 1)]


def idle(rows: int, shards: int) -> list[int]:
    return [count for busy in evenly(rows, (shards + 1) // 2) for count in (busy, 0)][:shards]


SKEWS: dict[str, Callable[[int, int], list[int]]] = {"even": evenly, "mild": mild, "heavy": heavy, "idle": idle}


def program(combine: Combine, rows: Rows, hidden: int) -> Program:
    """Compile dispatch and combine, with one pass over the buffer in place of the experts."""
    placement = combine.placement
    tokens, experts = placement.spec((Role.TOKENS,), (0,)), EXPERTS_EACH * placement.size(Role.EXPERTS)

    def run(x: Float[Array, "T D"], scale: Float[Array, "1"], rows: Rows) -> Float[Array, "T D"]:
        valid = rows.valid(placement)
        scores = jax.random.uniform(jax.random.key(0), (x.shape[0], experts)) * scale
        weights, chosen = jax.lax.top_k(scores, TOP_K)
        assert valid is not None
        chosen = jnp.where(valid[:, None], chosen, experts)
        gathered = combine.dispatch(rows, x, chosen, weights, EXPERTS_EACH)
        buffer, _, weights = gathered.values
        part = buffer * (weights[:, :1] * scale).astype(x.dtype)
        return combine.combine(gathered, gathered.partial_sum(part))

    mapped = jax.shard_map(
        run, mesh=placement.mesh, in_specs=(tokens, tokens, placement.spec((), ())), out_specs=tokens
    )
    shards = placement.size(Role.TOKENS)
    sharding = NamedSharding(placement.mesh, tokens)
    x, scale = jnp.ones((shards * rows.capacity, hidden), DTYPE, device=sharding), jnp.ones(shards, device=sharding)
    return Program.of(mapped, x, scale, jax.device_put(rows, placement.sharding((), ())))


def measure(placement: Placement, counts: list[int], hidden: int, hardware: Hardware, repeats: int) -> dict[str, Any]:
    """Time every strategy for one case, and find the choice of the policy."""
    rows = Rows.of(counts, placement)
    policy = Policy(placement, (RowBytes.of(hidden, DTYPE, top_k=TOP_K),), hardware)
    sized = {name: strategy.sized(placement, counts, rows.capacity) for name, strategy in STRATEGIES.items()}
    chosen = policy.decide(counts, rows.capacity).route.combine
    programs = {name: program(combine, rows, hidden) for name, combine in sized.items()}
    unique = {name: next(other for other in programs if same(programs[other], programs[name])) for name in programs}
    timed = interleaved({name: programs[name] for name in set(unique.values())}, repeats)
    times = {name: timed[unique[name]] for name in programs}
    (name,) = (name for name, combine in sized.items() if combine == chosen)
    best = min(times, key=lambda name: times[name].median)
    return {
        "ms": {name: time.median * 1e3 for name, time in times.items()},
        "chosen": name,
        "best": best,
        "times_best": times[name].median / times[best].median,
    }


def same(one: Program, other: Program) -> bool:
    """True if two strategies compile to one program: a ragged combine without a base is a reduction."""
    return instructions(one) == instructions(other)


def instructions(program: Program) -> list[str]:
    """Instructions of the compiled program, without metadata."""
    lines = (program.compiled.as_text() or "").splitlines()
    return [re.sub(r", metadata=\{[^}]*\}", "", line) for line in lines if " = " in line]


def cases(options: Namespace, hardware: Hardware) -> Iterator[dict[str, Any]]:
    """Measure the cases that fit in memory."""
    for shards, hidden, rows, skew in product(options.shards, options.hidden, options.rows, SKEWS):
        placement = Placement(make_mesh({"expert": shards}, jax.devices()[:shards]))
        counts = SKEWS[skew](rows, shards)
        case = {"shards": shards, "hidden": hidden, "rows": rows, "skew": skew}
        buffer = Rows.of(counts, placement).capacity * shards * hidden * jnp.dtype(DTYPE).itemsize
        if COPIES * buffer * hardware.sharers(placement) > hardware.memory:
            print(f"skipped, as its buffers exceed the memory: {case}")
            continue
        repeats = options.repeats * (1 if rows > FEW_ROWS else EXTRA_REPEATS)
        yield case | measure(placement, counts, hidden, hardware, repeats)


def main() -> None:
    parser = arguments()
    options, placement = script.begin(parser, QUICK)
    if options.mesh:
        parser.error("every case makes its own mesh: use --shards instead of --mesh")
    hardware = as_hardware(options.hardware)
    print(f"predicted for {hardware.name}: {hardware.source}")
    columns = {"shards": ">6", "hidden": ">6", "rows": ">6", "skew": ">6"}
    times = {f"{name} ms": ">13" for name in STRATEGIES}
    table = script.Table(columns | times | {"chosen": ">11", "x best": ">7"})
    results = []
    for case in cases(options, hardware):
        results.append(case)
        measured = (f"{ms:.2f}" for ms in case["ms"].values())
        table.row(*(case[name] for name in columns), *measured, case["chosen"], f"{case['times_best']:.2f}")
    if not results:
        parser.error("no case fits in memory: use fewer --rows or a smaller --hidden")
    right = sum(case["times_best"] <= TOLERANCE for case in results) / len(results)
    always = {
        name: sum(c["ms"][name] <= TOLERANCE * min(c["ms"].values()) for c in results) / len(results)
        for name in STRATEGIES
    }
    print(
        f"within {TOLERANCE - 1:.0%} of the best: the policy in {right:.0%} of {len(results)} cases; "
        + ", ".join(f"always {name} {share:.0%}" for name, share in always.items())
    )
    shares = {"right": right, "always": always}
    script.finish("policy", options, placement, {**shares, "results": results}, partial(draw, results=results))


def arguments() -> ArgumentParser:
    parser = script.parser(
        "policy", "Time of every strategy over a grid of cases, against the choice of the policy.", repeats=9
    )
    parser.add_argument("--hardware", help="name, or file that moe-jax bench --calibrate wrote")
    parser.add_argument("--shards", type=script.several(script.above_one), default=[2, 4, 8], help="token shards")
    parser.add_argument(
        "--rows", type=script.several(script.positive), default=[8, 64, 512, 4096], help="rows of all token shards"
    )
    parser.add_argument("--hidden", type=script.several(script.positive), default=[1024, 8192], help="numbers in a row")
    return parser


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    """Plot the sorted times of the policy and of each strategy, relative to the best strategy of each case."""
    for name in ("policy", *STRATEGIES):
        taken = [case["chosen"] if name == "policy" else name for case in results]
        ratios = [c["ms"][one] / min(c["ms"].values()) for c, one in zip(results, taken, strict=True)]
        axes.plot(sorted(ratios), label=name)
    axes.set(yscale="log", xlabel="cases, sorted", ylabel="time relative to the best")


if __name__ == "__main__":
    script.run(main)
