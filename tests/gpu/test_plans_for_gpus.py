"""Plans of `moe-jax plan --target` agree with the programs that XLA's GPU compiler makes, without a GPU.

`make test` installs the compiler into the directory `gpu-compiler` of the environment.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.published import QWEN3_30B_A3B
from moe_jax.analysis.census import dot_flops
from moe_jax.kernels.grouped_matmul.pallas import tile_rows

COMPILER = Path(sys.prefix) / "gpu-compiler"
LAYERS, ROWS, POSITIONS, HIDDEN = 48, 64, 2048, 2048
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
EXPERTS, TOP_K, WIDTH, VOCABULARY = 128, 8, 768, 151936
HIDDEN_BYTES = HIDDEN * 2
EACH = [HIDDEN * HEADS * HEAD_DIM, HIDDEN * KV_HEADS * HEAD_DIM, HIDDEN * WIDTH * EXPERTS // 8]
WEIGHTS = {HIDDEN * VOCABULARY, *EACH, 2 * EACH[-1], *(LAYERS * each for each in EACH), 2 * LAYERS * EACH[-1]}
"""Sizes of a device's weights, except norms and routers, which are float32 in the model."""
SAMPLING_BYTES = ROWS * (3 + 1) * 4
"""Bytes that two heads devices send to sample tokens of 64 rows: three numbers gathered, one summed."""

MOE_JAX = [sys.executable, "-c", "from moe_jax.cli import main; main()"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Function that runs `moe-jax plan --json`, in one process with the compiler on its path, and adds the HLO text."""
    assert COMPILER.is_dir(), "the GPU compiler is not installed: run `make test`, or see its rule in the Makefile"
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    always = ["plan", "--json", "--target", "h100", "--model", str(model), "--rows", str(ROWS)]
    always += ["--max-length", str(POSITIONS)]
    paths = [str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])]
    dump = f"--xla_dump_to={model} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_advance"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": dump}
    command = [sys.executable, str(Path(__file__).with_name("plans.py"))]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        reader = process.stdout
        assert reader

        @cache
        def run(*arguments: str) -> dict[str, Any]:
            print(json.dumps([*always, *arguments]), file=process.stdin, flush=True)
            found = json.loads(reader.readline())
            programs = model.glob("*gpu_after_optimizations.txt")
            return found | {"program": max(programs, key=lambda path: path.stat().st_mtime).read_text()}

        yield run


def ideal_flops() -> float:
    """FLOPs of a device: every row with the weights that it visits, and with the keys and values of all positions."""
    projections = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM + HIDDEN * EXPERTS + TOP_K * 3 * HIDDEN * WIDTH
    attention = 2 * HEADS * HEAD_DIM * POSITIONS
    return 2 * ROWS * (LAYERS * (projections + attention) + HIDDEN * VOCABULARY)


def expert_flops() -> float:
    """FLOPs of a device in the tiles of the grouped matmuls, if rows choose experts at random."""
    assignments, held = ROWS * TOP_K, EXPERTS // 8
    size = tile_rows(assignments, held)
    rows = np.random.default_rng(0).multinomial(assignments, [1 / held] * held, LAYERS)
    return float(2 * 3 * HIDDEN * WIDTH * size * np.sum(-(-rows // size)))


def weight_sizes(program: str, dtype: str) -> set[int]:
    """Sizes of the program's arrays of a dtype that equal the size of a weight, or of that weight in all layers.

    Values inside fusions are not arrays in memory. Arrays with a dimension of the rows are not weights.
    """
    computations = (c for c in re.split(r"\n(?=\S)", program) if not re.match(r"%\S*(fused|wrapped|fusion)", c))
    lines = chain.from_iterable(computation.splitlines()[1:] for computation in computations)
    results = (line.partition(" = ")[2].partition("(")[0] for line in lines)
    arrays = (
        map(int, shape.split(",")) for result in results for shape in re.findall(rf"\b{dtype}\[([\d,]+)\]", result)
    )
    return {math.prod(array) for array in map(tuple, arrays) if ROWS not in array} & WEIGHTS


def combine_bytes(plan: dict[str, Any], strategy: str) -> float:
    (sent,) = (cost["combine_bytes"] for cost in plan["candidates"] if cost["route"] == strategy)
    return sent


def assert_sends_the_predicted_bytes(plan: dict[str, Any]) -> None:
    assert plan["collective_bytes_per_step"] == plan["sent_bytes_per_step"] > 0


def test_dp8_ep8_scatter_sends_half_the_bytes_of_an_all_reduce(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8")
    assert found["route"] == "ScatterCombine"
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "reduce-scatter": LAYERS}
    assert found["asynchronous_collectives_per_step"] == found["collectives_per_step"]
    assert_sends_the_predicted_bytes(found)
    assert combine_bytes(found, "ScatterCombine") <= 0.51 * combine_bytes(found, "ReduceCombine")
    assert {(c["kind"], c["result"], c["devices"], c["times"]) for c in found["collectives"]} == {
        ("all-gather", "f32[512,16], bf16[512,2048]", 8, LAYERS),
        ("reduce-scatter", "bf16[64,2048]", 8, LAYERS),
    }
    assert found["cache_bytes"] == LAYERS * ROWS * KV_HEADS * POSITIONS * HEAD_DIM * 2 * 2
    assert found["memory_bytes"] < 1.1 * (found["weight_bytes"] + found["cache_bytes"])
    assert found["fits"]
    assert dot_flops(found["program"]) + expert_flops() <= 1.3 * ideal_flops()
    assert weight_sizes(found["program"], "bf16"), "the stacked weights are arguments of the program"
    assert not weight_sizes(found["program"], "f32")


def test_reduce_compiles_to_an_all_reduce(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8", "--combine", "reduce")
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "all-reduce": LAYERS}
    assert_sends_the_predicted_bytes(found)


def test_ragged_sends_little_more_than_the_real_rows(plan: Callable[..., dict[str, Any]]) -> None:
    counts = [40, 30, 28, 30, 30, 30, 30, 30]
    found = plan("--mesh", "expert=8", "--combine", "ragged", "--counts", ",".join(map(str, counts)))
    assert found["collectives_per_step"]["reduce-scatter"] == LAYERS
    assert_sends_the_predicted_bytes(found)
    assert combine_bytes(found, "RaggedCombine") <= 1.15 * LAYERS * 7 / 8 * sum(counts) * HIDDEN_BYTES


def test_rows_of_one_shard_are_packed(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8", "--counts", "1024,1,1,1,1,1,1,1", "--max-length", "128")
    assert found["route"] == "ReduceCombine"
    assert found["collectives_per_step"] == {"all-reduce": 3 * LAYERS}
    assert_sends_the_predicted_bytes(found)


def test_attention_tp_adds_sums_over_heads_and_gathers_no_logits(
    plan: Callable[..., dict[str, Any]],
) -> None:
    found = plan("--mesh", "expert=4,tensor=2", "--combine", "scatter")
    assert found["collectives_per_step"] == {
        "all-gather": LAYERS + 1,
        "reduce-scatter": LAYERS,
        "all-reduce": 2 * LAYERS + 2,
    }
    embedding = 64 * HIDDEN_BYTES  # summed over two devices
    assert found["collective_bytes_per_step"] == found["sent_bytes_per_step"] + embedding + SAMPLING_BYTES


def test_split_residuals_need_no_all_reduce_of_rows(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=4,tensor=2", "--combine", "scatter", "--residual", "split")
    assert found["route"] == "ScatterCombine + SplitResidual"
    sampler = {"all-reduce": 1}
    assert found["collectives_per_step"] == sampler | {"all-gather": 2 * LAYERS + 2, "reduce-scatter": 2 * LAYERS + 1}
    embedding_and_last_rows = 2 * 32 * HIDDEN_BYTES
    assert found["collective_bytes_per_step"] == found["sent_bytes_per_step"] + embedding_and_last_rows + SAMPLING_BYTES


def test_all_to_all_is_chosen_for_many_devices_and_sends_rows_only_to_their_experts(
    plan: Callable[..., dict[str, Any]],
) -> None:
    devices, rows = 64, 256
    found = plan("--mesh", f"expert={devices}", "--rows", str(rows))
    assert found["route"] == "AllToAllCombine"
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "ragged-all-to-all": 2 * LAYERS}
    visited_share = 1 - (1 - 1 / devices) ** TOP_K
    metadata_bytes = (devices - 1) * rows * TOP_K * 8 * LAYERS
    row_bytes = 2 * (devices - 1) * rows * HIDDEN_BYTES * LAYERS
    assert found["sent_bytes_per_step"] == pytest.approx(metadata_bytes + visited_share * row_bytes)
    assert found["collective_bytes_per_step"] == metadata_bytes + row_bytes, "the buffers hold all rows"
    assert combine_bytes(found, "AllToAllCombine") < 0.2 * combine_bytes(found, "ScatterCombine")


def test_rows_are_gathered_in_one_byte_per_number(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8", "--combine", "scatter", "--gather-dtype", "float8_e4m3fn")
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "reduce-scatter": LAYERS}
    assert_sends_the_predicted_bytes(found)
    gathered = 7 * 64 * (2048 + 16 * 4 + 8 * 8)
    assert found["sent_bytes_per_step"] == LAYERS * (gathered + 7 * 64 * HIDDEN_BYTES)


def test_an_axis_between_hosts_costs_more_and_replicas_are_free(plan: Callable[..., dict[str, Any]]) -> None:
    two_hosts = plan("--mesh", "expert=16", "--combine", "scatter")
    replicas = plan("--mesh", "data=32,expert=8", "--combine", "scatter")
    for found, devices in ((two_hosts, 16), (replicas, 8)):
        assert {collective["devices"] for collective in found["collectives"]} == {devices}
        assert found["collectives_per_step"] == {"all-gather": LAYERS, "reduce-scatter": LAYERS}
        assert_sends_the_predicted_bytes(found)
    assert two_hosts["collective_share"] > 2 * replicas["collective_share"]
