"""What `moe-jax plan` says is what XLA's GPU compiler makes of the program; no GPU is needed.

The compiler is a package beside those of the tests: `make test` installs it into `gpu-compiler` of the environment.
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
"""Numbers of a device's weights, but for norms, and for routers, which are float32 from the start."""
CHOICE_BYTES = ROWS * (3 + 1) * 4
"""What two heads devices send to choose the token of 64 rows: three numbers gathered, one summed."""

MOE_JAX = [sys.executable, "-c", "from moe_jax.cli import main; main()"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """`moe-jax plan --json`, in one process for all plans that has the compiler on its path; and the program's text."""
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
    """Of a device: every row with the weights that it visits, and with the keys and values of all positions."""
    projections = 2 * HIDDEN * (HEADS + KV_HEADS) * HEAD_DIM + HIDDEN * EXPERTS + TOP_K * 3 * HIDDEN * WIDTH
    attention = 2 * HEADS * HEAD_DIM * POSITIONS
    return 2 * ROWS * (LAYERS * (projections + attention) + HIDDEN * VOCABULARY)


def expert_flops() -> float:
    """Of a device: the tiles of the grouped matmuls, as many as rows that are spread by chance fill."""
    assignments, held = ROWS * TOP_K, EXPERTS // 8
    size = tile_rows(assignments, held)
    emitted = np.random.default_rng(0).multinomial(assignments, [1 / held] * held, LAYERS)
    return float(2 * 3 * HIDDEN * WIDTH * size * np.sum(-(-emitted // size)))


def sizes_of_weights(program: str, dtype: str) -> set[int]:
    """Of the arrays in memory (within fusions there are none), those that are as large as a weight, or as all layers'
    together, and have no dimension of the rows."""
    computations = (c for c in re.split(r"\n(?=\S)", program) if not re.match(r"%\S*(fused|wrapped|fusion)", c))
    segments = chain.from_iterable(computation.splitlines()[1:] for computation in computations)
    results = (segment.partition(" = ")[2].partition("(")[0] for segment in segments)
    arrays = (
        map(int, found.split(",")) for segment in results for found in re.findall(rf"\b{dtype}\[([\d,]+)\]", segment)
    )
    return {math.prod(array) for array in map(tuple, arrays) if ROWS not in array} & WEIGHTS


def combine_bytes(plan: dict[str, Any], strategy: str) -> float:
    (found,) = (cost["combine_bytes"] for cost in plan["candidates"] if cost["route"] == strategy)
    return found


def assert_sends_what_the_policy_counts(plan: dict[str, Any]) -> None:
    assert plan["collective_bytes_per_step"] == plan["sent_bytes_per_step"] > 0


def test_dp8_ep8_scatters_half_the_bytes_of_a_sum(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8")
    assert found["route"] == "ScatterCombine"
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "reduce-scatter": LAYERS}
    assert found["asynchronous_collectives_per_step"] == found["collectives_per_step"]
    assert_sends_what_the_policy_counts(found)
    assert combine_bytes(found, "ScatterCombine") <= 0.51 * combine_bytes(found, "ReduceCombine")
    assert {(c["kind"], c["result"], c["devices"], c["times"]) for c in found["collectives"]} == {
        ("all-gather", "f32[512,16], bf16[512,2048]", 8, LAYERS),
        ("reduce-scatter", "bf16[64,2048]", 8, LAYERS),
    }
    assert found["cache_bytes"] == LAYERS * ROWS * KV_HEADS * POSITIONS * HEAD_DIM * 2 * 2
    assert found["memory_bytes"] < 1.1 * (found["weight_bytes"] + found["cache_bytes"])
    assert found["fits"]
    assert dot_flops(found["program"]) + expert_flops() <= 1.3 * ideal_flops()
    assert sizes_of_weights(found["program"], "bf16"), "the stacks that the program is given"
    assert not sizes_of_weights(found["program"], "f32")


def test_reduce_and_slice_keeps_its_all_reduce(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8", "--combine", "reduce")
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "all-reduce": LAYERS}
    assert_sends_what_the_policy_counts(found)


def test_ragged_sends_little_more_than_the_rows(plan: Callable[..., dict[str, Any]]) -> None:
    counts = [40, 30, 28, 30, 30, 30, 30, 30]
    found = plan("--mesh", "expert=8", "--combine", "ragged", "--counts", ",".join(map(str, counts)))
    assert found["collectives_per_step"]["reduce-scatter"] == LAYERS
    assert_sends_what_the_policy_counts(found)
    assert combine_bytes(found, "RaggedCombine") <= 1.15 * LAYERS * 7 / 8 * sum(counts) * HIDDEN_BYTES


def test_rows_on_one_shard_are_packed(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8", "--counts", "1024,1,1,1,1,1,1,1", "--max-length", "128")
    assert found["route"] == "ReduceCombine"
    assert found["collectives_per_step"] == {"all-reduce": 3 * LAYERS}
    assert_sends_what_the_policy_counts(found)


def test_with_attention_tp_heads_are_summed_besides_and_no_logits_are_gathered(
    plan: Callable[..., dict[str, Any]],
) -> None:
    found = plan("--mesh", "expert=4,tensor=2", "--combine", "scatter")
    assert found["collectives_per_step"] == {
        "all-gather": LAYERS + 1,
        "reduce-scatter": LAYERS,
        "all-reduce": 2 * LAYERS + 2,
    }
    embedding = 64 * HIDDEN_BYTES  # summed over two devices
    assert found["collective_bytes_per_step"] == found["sent_bytes_per_step"] + embedding + CHOICE_BYTES


def test_split_residuals_leave_no_all_reduce_of_rows(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=4,tensor=2", "--combine", "scatter", "--residual", "split")
    assert found["route"] == "ScatterCombine + SplitResidual"
    choice = {"all-reduce": 1}
    assert found["collectives_per_step"] == choice | {"all-gather": 2 * LAYERS + 2, "reduce-scatter": 2 * LAYERS + 1}
    embedding_and_last_rows = 2 * 32 * HIDDEN_BYTES
    assert found["collective_bytes_per_step"] == found["sent_bytes_per_step"] + embedding_and_last_rows + CHOICE_BYTES


def test_all_to_all_is_chosen_for_many_rows_on_more_devices_than_a_row_visits_and_sends_them_to_their_experts_only(
    plan: Callable[..., dict[str, Any]],
) -> None:
    devices, rows = 64, 256
    found = plan("--mesh", f"expert={devices}", "--rows", str(rows))
    assert found["route"] == "AllToAllCombine"
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "ragged-all-to-all": 2 * LAYERS}
    visited = 1 - (1 - 1 / devices) ** TOP_K
    beside = (devices - 1) * rows * TOP_K * 8 * LAYERS
    of_rows = 2 * (devices - 1) * rows * HIDDEN_BYTES * LAYERS
    assert found["sent_bytes_per_step"] == pytest.approx(beside + visited * of_rows)
    assert found["collective_bytes_per_step"] == beside + of_rows, "the buffers hold all rows"
    assert combine_bytes(found, "AllToAllCombine") < 0.2 * combine_bytes(found, "ScatterCombine")


def test_rows_are_gathered_in_a_byte_per_number(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=8", "--combine", "scatter", "--gather-dtype", "float8_e4m3fn")
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "reduce-scatter": LAYERS}
    assert_sends_what_the_policy_counts(found)
    gathered = 7 * 64 * (2048 + 16 * 4 + 8 * 8)
    assert found["sent_bytes_per_step"] == LAYERS * (gathered + 7 * 64 * HIDDEN_BYTES)


def test_an_axis_between_hosts_costs_more_and_replicas_cost_nothing(plan: Callable[..., dict[str, Any]]) -> None:
    two_hosts = plan("--mesh", "expert=16", "--combine", "scatter")
    replicas = plan("--mesh", "data=32,expert=8", "--combine", "scatter")
    for found, together in ((two_hosts, 16), (replicas, 8)):
        assert {collective["devices"] for collective in found["collectives"]} == {together}
        assert found["collectives_per_step"] == {"all-gather": LAYERS, "reduce-scatter": LAYERS}
        assert_sends_what_the_policy_counts(found)
    assert two_hosts["collective_share"] > 2 * replicas["collective_share"]
