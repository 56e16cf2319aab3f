"""Time of one MoE block (route, gather, experts, combine) under each strategy, with rows spread evenly and unevenly.

    rows  rows of all token shards, without padding
    skew  share of the rows that the first shard takes before the others are spread evenly: 0 is even, 1 all on one

python -m bench.moe [--mesh expert=8] [--rows 64,512] [--skews 0,0.5] [--experts 32] [--quick]; --help lists the rest.
"""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from bench import script
from bench.timing import Program, format_time, measure_programs
from moe_jax.analysis.explain import evenly
from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.errors import PlacementError
from moe_jax.layers import MoE, parameter
from moe_jax.models.sharded import DTYPES
from moe_jax.sharding import FINE, Combine, Placement, Policy, Role, RowBytes, Rows, WholeResidual, as_hardware, bucket
from moe_jax.sharding.policy import STRATEGIES

QUICK = {
    "repeats": 3, "rows": [32], "skews": [0.1], "experts": 8, "top_k": 2, "hidden": 32, "width": 16,
}  # fmt: skip


class MoEBlock:
    """An MoE block with random weights on a placement. T rows of a token shard, D hidden size."""

    def __init__(self, config: MoEConfig, hidden: int, dtype: str, placement: Placement) -> None:
        for name, count, role in (
            ("experts", config.experts, Role.EXPERTS),
            ("units of width", config.width, Role.FFN),
        ):
            if count % placement.size(role):
                raise PlacementError(f"{count} {name} do not divide over {placement.describe(role)}")
        make = partial(MoE, config, hidden, dtype=dtype)
        self.placement, self.hidden, self.dtype = placement, hidden, dtype
        self.graph, abstract = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, parameter.placed(abstract, placement))
        self.parameters = jax.jit(lambda: nnx.state(make(rngs=nnx.Rngs(0))), out_shardings=self.shardings)()
        self.policy = Policy(placement, (RowBytes.of(hidden, dtype, top_k=config.top_k),), as_hardware(None))

    def program(self, combine: Combine, rows: Rows) -> Program:
        placement = self.placement
        tokens = placement.spec((Role.TOKENS,), (0,))

        def run(parameters: Any, x: Float[Array, "T D"], rows: Rows) -> Float[Array, "T D"]:
            return nnx.merge(self.graph, parameters)(x, rows, combine)[0]

        in_specs = (jax.tree.map(lambda sharding: sharding.spec, self.shardings), tokens, placement.spec((), ()))
        mapped = jax.shard_map(run, mesh=placement.mesh, in_specs=in_specs, out_specs=tokens)
        x = jax.random.normal(jax.random.key(1), (placement.size(Role.TOKENS) * rows.capacity, self.hidden), self.dtype)
        placed = (
            jax.device_put(x, NamedSharding(placement.mesh, tokens)),
            jax.device_put(rows, placement.sharding((), ())),
        )
        return Program.of(mapped, self.parameters, *placed)


def spread(rows: int, shards: int, skew: float) -> list[int]:
    """Number of rows of each shard."""
    extra = round(rows * skew)
    first, *others = evenly(rows - extra, shards)
    return [first + extra, *others]


def measure(block: MoEBlock, total: int, skew: float, repeats: int) -> dict[str, Any]:
    placement = block.placement
    counts = spread(total, placement.size(Role.TOKENS), skew)
    rows = Rows.of(counts, placement, bucket(max(counts), FINE))
    sized = {name: strategy.sized(placement, counts, rows.capacity) for name, strategy in STRATEGIES.items()}
    variants = measure_programs({name: block.program(combine, rows) for name, combine in sized.items()}, repeats)
    chosen = replace(block.policy, residual=WholeResidual).decide(counts, rows.capacity).route.combine
    (policy,) = (name for name, strategy in STRATEGIES.items() if type(chosen) is strategy)
    return {"rows": total, "skew": skew, "counts": counts, "variants": variants, "policy": policy}


def main() -> None:
    options, placement = script.begin(arguments(), QUICK)
    config = MoEConfig(options.experts, options.top_k, options.width, router=RouterConfig(norm=1))
    block = MoEBlock(config, options.hidden, options.dtype, placement)

    table = script.Table({"rows": ">6", "skew": ">5", **{f"{name} ms": ">16" for name in STRATEGIES}, "policy": ">11"})
    results = []
    for total in options.rows:
        for skew in options.skews:
            results.append(result := measure(block, total, skew, options.repeats))
            table.row(total, skew, *map(format_time, result["variants"].values()), result["policy"])
    print("policy: the strategy that moe_jax chooses for whole rows from its hardware record, not from these times")
    sizes = {name: getattr(options, name) for name in ("experts", "top_k", "hidden", "width", "dtype")}
    script.finish("moe", options, placement, {**sizes, "results": results}, lambda axes: draw(axes, results))


def arguments() -> ArgumentParser:
    parser = script.parser("moe", "Time of one MoE block under each strategy.", repeats=10)
    parser.add_argument(
        "--rows", type=script.several(script.positive), default=[64, 512], help="rows of all token shards"
    )
    parser.add_argument(
        "--skews", type=script.several(script.share), default=[0.0, 0.25, 0.75], help="shares from 0 to 1"
    )
    parser.add_argument("--experts", type=script.positive, default=32)
    parser.add_argument("--top-k", type=script.positive, default=4, help="experts of each row")
    parser.add_argument("--hidden", type=script.positive, default=512)
    parser.add_argument("--width", type=script.positive, default=256, help="intermediate size of each expert")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    return parser


def draw(axes: script.Axes, results: list[dict[str, Any]]) -> None:
    """Draw a group of bars for each number of rows and skew."""
    labels = [f"{result['rows']} rows\nskew {result['skew']}" for result in results]
    script.bars(axes, labels, {name: [result["variants"][name] for result in results] for name in STRATEGIES})


if __name__ == "__main__":
    script.run(main)
