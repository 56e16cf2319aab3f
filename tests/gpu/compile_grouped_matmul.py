"""Compiles grouped matmuls for GPUs that are not there, and prints as JSON what came of it.

M  rows     G  groups     D  inputs     F  outputs
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from moe_jax.layers.grouped_matmul import grouped_matmul, products_on
from moe_jax.sharding import make_mesh
from moe_jax.sharding.targets import COMPILER_OPTIONS, target_devices

G, D, F = 16, 2048, 768


def compiled(function: Callable[..., jax.Array], *shapes: jax.ShapeDtypeStruct, target: str) -> Compiled:
    mesh = make_mesh("expert=1", target_devices(target, 1))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*shapes).lower().compile(dict(COMPILER_OPTIONS))


def found(compiled: Compiled) -> dict[str, Any]:
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    return {
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "kernels": sorted(set(re.findall('custom_call_target="([^"]*)"', text))),
        "loops": text.count(" while("),
    }


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line)
        rows = jax.ShapeDtypeStruct((case["rows"], D), case["dtype"])
        sizes = jax.ShapeDtypeStruct((G,), jnp.int32)
        weights = jax.ShapeDtypeStruct((G, D, F), case["dtype"])
        by = products_on(target_devices(case["target"], 1)[0])

        def product(rows: jax.Array, weights: jax.Array, sizes: jax.Array, by: Any = by) -> jax.Array:
            return grouped_matmul(rows, weights, sizes, by)

        print(json.dumps(found(compiled(product, rows, weights, sizes, target=case["target"]))), flush=True)


main()
