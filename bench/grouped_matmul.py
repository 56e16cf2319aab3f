"""Time of the grouped matmul of rows with the weights of their experts, against a plain matmul and `ragged_dot`.

    ours      `moe_jax.kernels.grouped_matmul.dispatch`
    plain     one matmul of all rows with the weights of one expert: as many operations, fewer bytes
    ragged    `jax.lax.ragged_dot`

The experts of each row are random. python -m bench.grouped_matmul [--rows 256,32,1] [--quick]; --help lists the rest.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench import script
from bench.timing import Program, format_time, interleaved
from moe_jax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_on
from moe_jax.sharding import Placement

QUICK = {"repeats": 3, "rows": [8, 1], "experts": 8, "inputs": 32, "outputs": 16}


def variants(rows: int, options: Namespace, placement: Placement) -> dict[str, Program]:
    """Compile each way to multiply `rows` rows."""
    random, backend = np.random.default_rng(0), grouped_matmul_on(placement.device)
    chosen = [random.permutation(options.experts)[: options.top_k] for _ in range(rows)]
    sizes = jnp.asarray(np.bincount(np.concatenate(chosen), minlength=options.experts), jnp.int32)
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows * options.top_k, options.inputs), options.dtype)
    weights = jax.random.normal(keys[1], (options.experts, options.inputs, options.outputs), options.dtype)
    return {
        "ours": Program.of(lambda x, weights, sizes: grouped_matmul(x, weights, sizes, backend), x, weights, sizes),
        "plain": Program.of(jnp.matmul, x, weights[0]),
        "ragged": Program.of(lax.ragged_dot, x, weights, sizes),
    }


def measure(rows: int, options: Namespace, placement: Placement) -> dict[str, Any]:
    programs = variants(rows, options, placement)
    ours, ragged = np.asarray(programs["ours"]()), np.asarray(programs["ragged"]())
    times = interleaved(programs, options.repeats)
    return {
        "rows": rows,
        "assignments": rows * options.top_k,
        "variants": {name: time.as_dict() for name, time in times.items()},
        "times_plain": times["ours"].median / times["plain"].median,
        "times_ragged": times["ours"].median / times["ragged"].median,
        "largest_difference": float(np.max(np.abs(ours - ragged)) / np.max(np.abs(ragged))),
    }


def main() -> None:
    parser = script.parser(
        "grouped_matmul", "Time of the grouped matmul: ours, a plain matmul, ragged_dot.", repeats=30
    )
    parser.set_defaults(cpu_devices=1)
    parser.add_argument("--rows", type=script.several(script.positive), default=[256, 32, 1])
    for name, default in {"experts": 32, "top-k": 4, "inputs": 512, "outputs": 256}.items():
        parser.add_argument(f"--{name}", type=script.positive, default=default)
    parser.add_argument("--dtype", default="float32")
    options, placement = script.begin(parser, QUICK)
    table = script.Table({"rows": ">6", "assignments": ">11"} | dict.fromkeys(("ours, ms", "plain", "ragged"), ">16"))
    results = []
    for rows in options.rows:
        results.append(result := measure(rows, options, placement))
        table.row(rows, result["assignments"], *map(format_time, result["variants"].values()))
        print(f"       ours takes {result['times_plain']:.2f} times plain, {result['times_ragged']:.2f} times ragged")

    def draw(axes: script.Axes) -> None:
        labels = [f"{result['rows']} rows" for result in results]
        names = results[0]["variants"]
        script.bars(axes, labels, {name: [result["variants"][name] for result in results] for name in names})

    script.finish("grouped_matmul", options, placement, {"results": results}, draw)


if __name__ == "__main__":
    script.run(main)
