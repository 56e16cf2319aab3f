"""Scatter against reduce-and-slice: the combine alone, on all devices (eight virtual ones where there is no
accelerator).

python -m bench.combine [--repeats N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from bench.timing import interleaved, machine
from moe_jax.sharding import Combine, Placement, ReduceCombine, Rows, ScatterCombine

ROWS = (8, 64, 256, 1024)
WIDTHS = (1024, 4096)


def program(combine: Combine, rows: Rows, width: int) -> Callable[[], jax.Array]:
    """The combine of bfloat16 partial sums of all the rows, compiled for its own arguments."""
    spec = PartitionSpec("expert")

    def run(value: jax.Array, rows: Rows) -> jax.Array:
        gathered = combine.gather(rows, value[: rows.capacity, :1])  # for its form: what it moves is not used
        return combine.combine(gathered, gathered.partial_sum(value))

    placement = combine.placement
    total = int(np.sum(np.asarray(rows.counts)))
    mapped = jax.shard_map(run, mesh=placement.mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    devices = placement.mesh.devices.size
    value = jax.random.normal(jax.random.key(0), (devices * total, width), jnp.bfloat16)
    value = jax.device_put(value, jax.NamedSharding(placement.mesh, spec))
    return partial(jax.jit(mapped), value, jax.device_put(rows, jax.NamedSharding(placement.mesh, PartitionSpec())))


def measure(repeats: int) -> Iterator[dict[str, Any]]:
    placement = Placement.parse(f"expert={jax.device_count()}")
    for width in WIDTHS:
        for total in ROWS:
            counts = [total // jax.device_count()] * jax.device_count()
            rows = Rows.of(counts, placement)
            strategies = {"scatter": ScatterCombine(placement), "reduce": ReduceCombine(placement, total)}
            times = interleaved({name: program(s, rows, width) for name, s in strategies.items()}, repeats)
            yield {
                "rows": total,
                "width": width,
                **{f"{name}_ms": time.median * 1e3 for name, time in times.items()},
                **{f"{name}_spread": time.spread for name, time in times.items()},
                "speedup": times["reduce"].median / times["scatter"].median,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    jax.config.update("jax_num_cpu_devices", 8)

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{'rows':>5} {'width':>6} {'scatter ms':>16} {'reduce ms':>16} {'speedup':>8}")
    results = []
    for r in measure(repeats):
        results.append(r)
        scatter, reduce = (f"{r[f'{name}_ms']:9.3f} ±{r[f'{name}_spread']:4.0%}" for name in ("scatter", "reduce"))
        print(f"{r['rows']:5} {r['width']:6} {scatter:>16} {reduce:>16} {r['speedup']:8.2f}")
    print(json.dumps({"bench": "combine", **machine(), "results": results}))


if __name__ == "__main__":
    main()
