"""What `moe-jax plan` says is what XLA's GPU compiler makes of the program; no GPU is needed.

The compiler is a package beside those of the tests: `make test` installs it into `gpu-compiler` of the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.published import QWEN3_30B_A3B

COMPILER = Path(sys.prefix) / "gpu-compiler"
LAYERS, HIDDEN_BYTES = 48, 2048 * 2
CHOICE_BYTES = 64 * (3 + 1) * 4
"""What two heads devices send to choose the token of 64 rows: three numbers gathered, one summed."""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """`moe-jax plan --json`, in one process for all plans that has the compiler on its path."""
    assert COMPILER.is_dir(), "the GPU compiler is not installed: run `make test`, or see its rule in the Makefile"
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    always = ["plan", "--json", "--target", "h100", "--model", str(model), "--rows", "64", "--max-length", "2048"]
    paths = [str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": ""}
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
            return json.loads(reader.readline())

        yield run


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
    assert found["cache_bytes"] == LAYERS * 64 * 4 * 2048 * 128 * 2 * 2
    assert found["memory_bytes"] < 1.1 * (found["weight_bytes"] + found["cache_bytes"])
    assert found["fits"]


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


def test_all_to_all_sends_rows_to_their_experts_only(plan: Callable[..., dict[str, Any]]) -> None:
    found = plan("--mesh", "expert=16", "--combine", "all-to-all")
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "ragged-all-to-all": 2 * LAYERS}
    visited = 1 - (1 - 1 / 16) ** 8
    beside = 15 * 64 * 8 * 8 * LAYERS
    rows = 2 * 15 * 64 * HIDDEN_BYTES * LAYERS
    assert found["sent_bytes_per_step"] == pytest.approx(beside + visited * rows)
    assert found["collective_bytes_per_step"] == beside + rows, "the buffers hold all rows"
    assert (
        found["sent_bytes_per_step"] < 0.45 * plan("--mesh", "expert=16", "--combine", "scatter")["sent_bytes_per_step"]
    )


def test_all_to_all_is_chosen_for_many_rows_on_more_devices_than_a_row_visits(
    plan: Callable[..., dict[str, Any]],
) -> None:
    found = plan("--mesh", "expert=64", "--rows", "256")
    assert found["route"] == "AllToAllCombine"
    assert found["collectives_per_step"] == {"all-gather": LAYERS, "ragged-all-to-all": 2 * LAYERS}


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
