"""Compile grouped matmuls for GPU targets and print statistics of the programs as JSON.

Each line of the input is a case of `test_grouped_matmul_for_gpus.py`.

M  rows     G  groups     D  inputs     F  outputs     L  layers
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

from moe_jax.analysis.targets import COMPILER_OPTIONS, target_devices
from moe_jax.config import WeightDtype
from moe_jax.kernels.grouped_matmul import grouped_matmul, grouped_matmul_on
from moe_jax.kernels.quantized import QuantizedWeight
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding import make_mesh

G, D, F, L = 16, 2048, 768, 4
KINDS = {
    "exact": (WeightDtype.EXACT, 0),
    "int8": (WeightDtype.INT8, 1),
    "float8": (WeightDtype.FLOAT8, 1),
    "float8 in blocks": (WeightDtype.FLOAT8, D // 128),
}


def abstract_weights(weights: str, shape: tuple[int, ...], dtype: str) -> Any:
    """Return weights in the dtype of rows, or in eight bits with a scale for each output or each 128 of its inputs."""
    kind, blocks = KINDS[weights]
    if kind is WeightDtype.EXACT:
        return jax.ShapeDtypeStruct(shape, dtype)
    scales = jax.ShapeDtypeStruct((*shape[:2], blocks, shape[3]), jnp.float32)
    return QuantizedWeight(jax.ShapeDtypeStruct(shape, jnp.int8), scales, kind, dtype)


def compile_for(function: Callable[..., jax.Array], *shapes: Any, target: str) -> Compiled:
    mesh = make_mesh("expert=1", target_devices(target, 1))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return jax.jit(mapped).trace(*shapes).lower().compile(dict(COMPILER_OPTIONS))


def statistics(compiled: Compiled) -> dict[str, Any]:
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
        backend = grouped_matmul_on(target_devices(case["target"], 1)[0])
        rows = jax.ShapeDtypeStruct((case["rows"], D), case["dtype"])
        stack = abstract_weights(case["weights"], (L, G, D, D), case["dtype"])
        sizes = jax.ShapeDtypeStruct((G,), jnp.int32)

        def one(rows: jax.Array, stack: jax.Array, sizes: jax.Array, backend: Any = backend) -> jax.Array:
            return grouped_matmul(rows, stack[0, :, :, :F], sizes, backend)

        def layers(rows: jax.Array, stack: Any, sizes: jax.Array, backend: Any = backend) -> jax.Array:
            def layer(rows: jax.Array, at: tuple[jax.Array, Any]) -> tuple[jax.Array, None]:
                index, weights = at
                return grouped_matmul(rows, weights[...], sizes, backend, StackedWeight(stack, index)), None

            return lax.scan(layer, rows, (jnp.arange(L), stack))[0]

        function = {"one": one, "layers": layers}[case["of"]]
        weights = stack if case["of"] == "layers" else jax.ShapeDtypeStruct((1, G, D, F), case["dtype"])
        print(json.dumps(statistics(compile_for(function, rows, weights, sizes, target=case["target"]))), flush=True)


main()
