"""Benchmark scripts with tiny sizes: their output is complete and consistent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import against, scaling, timing

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
}


def bench(name: str, directory: Path, *arguments: str) -> tuple[dict[str, Any], str, str]:
    """Run a script in a directory; return its JSON line, its standard output and its standard error."""
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--json", "line.json", *arguments]
    done = subprocess.run(command, cwd=directory, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert (directory / "line.json").read_text().strip() == line
    printed = json.loads(line)
    assert printed["bench"] == name
    assert printed["devices"] == "8 x cpu (virtual)"
    assert {"host", "jax", "flax", "placement"} <= printed.keys()
    return printed, done.stdout, done.stderr


def check_plot(directory: Path, name: str, messages: str) -> None:
    """Check that the script wrote a plot, or reported that matplotlib is not installed."""
    plot = directory / f"bench_{name}.png"
    assert plot.exists() == ("plot written" in messages) == ("pip install '.[bench]'" not in messages)
    assert not plot.exists() or plot.read_bytes().startswith(b"\x89PNG")


def check_time(time: dict[str, float]) -> None:
    assert time["ms"] > 0
    assert time["spread"] >= 0


def test_combine_without_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    printed, _, messages = bench("combine", tmp_path)
    assert "plot not drawn" in messages
    check_plot(tmp_path, "combine", messages)
    for result in printed["results"]:
        scatter, reduce = result["variants"]["scatter"], result["variants"]["reduce"]
        assert (scatter["collectives"], reduce["collectives"]) == ({"reduce-scatter": 1}, {"all-reduce": 1})
        assert reduce["sent_bytes"] == 2 * scatter["sent_bytes"]
        assert result["speedup"] == pytest.approx(reduce["ms"] / scatter["ms"])
        check_time(scatter)
        check_time(reduce)


def test_grouped_matmul(tmp_path: Path) -> None:
    printed, shown, messages = bench("grouped_matmul", tmp_path, "--cpu-devices", "8")
    check_plot(tmp_path, "grouped_matmul", messages)
    assert "times plain" in shown
    assert [result["assignments"] for result in printed["results"]] == [32, 4]
    for result in printed["results"]:
        ours, plain, ragged = (result["variants"][name] for name in ("ours", "plain", "ragged"))
        for each in (ours, plain, ragged):
            check_time(each)
        assert result["times_plain"] == pytest.approx(ours["ms"] / plain["ms"])
        assert result["times_ragged"] == pytest.approx(ours["ms"] / ragged["ms"])
        assert result["largest_difference"] < 1e-5


def test_moe(tmp_path: Path) -> None:
    printed, shown, messages = bench("moe", tmp_path)
    check_plot(tmp_path, "moe", messages)
    assert "ragged ms" in shown
    (result,) = printed["results"]
    assert sum(result["counts"]) == result["rows"]
    assert max(result["counts"]) > result["rows"] * result["skew"]
    assert result["policy"] in result["variants"]
    found = {name: variant["collectives"] for name, variant in result["variants"].items()}
    assert found["scatter"] == {"all-gather": 2, "reduce-scatter": 1}
    assert found["reduce"] == {"all-gather": 2, "all-reduce": 1}
    assert found["ragged"].keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert found["all-to-all"] == {"all-gather": 1, "all-to-all": 2}
    for variant in result["variants"].values():
        check_time(variant)


def test_decode(tmp_path: Path) -> None:
    printed, shown, messages = bench("decode", tmp_path, "--trace", "trace")
    check_plot(tmp_path, "decode", messages)
    assert "tokens  the same in both" in shown
    assert printed["different_tokens"] == 0
    assert printed["scopes"] == ["attention", "ffn", "route", "gather", "experts", "combine", "head", "sample"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    reduce, scatter = printed["variants"]["reduce"], printed["variants"]["scatter"]
    assert reduce["collectives"] == {"all-gather": 4, "all-reduce": 2}
    assert scatter["collectives"] == {"all-gather": 4, "reduce-scatter": 2}
    assert scatter["sent_bytes"] < reduce["sent_bytes"]
    for variant in (reduce, scatter):
        check_time(variant["step"])
        check_time(variant["collective"])
        assert variant["tokens_per_second"] == pytest.approx(printed["sequences"] / variant["step"]["ms"] * 1e3)


def test_a_comparison_without_torch_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    command = [sys.executable, "-m", "bench.decode", "--quick", "--against", "transformers"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == ("not compared: No module named torch; run pip install '.[compare]'")


def test_throughputs_follow_from_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    workload = against.Workload(prompt=8, tokens=3)
    options = Namespace(repeats=3)

    def generate(tokens: int) -> np.ndarray:
        nonlocal now
        now += 0.02 * tokens
        return np.zeros((2, tokens), int)

    limits = {"bytes_per_second": 1e9, "flops_per_second": 1e9}
    found = against.compare(workload, 2, generate, generate, options, limits)
    ours = found["speeds"]["moe_jax"]
    assert ours["decode"] == pytest.approx(2 / 0.02)
    assert ours["prefill"] == pytest.approx(2 * 8 / 0.02)
    assert ours["memory"] == pytest.approx(ours["decode"] / 2 * workload.step_bytes(2) / 1e9)
    assert ours["compute"] == pytest.approx(ours["prefill"] / 16 * workload.prompt_flops(2) / 1e9)
    assert found["times"]["decode"] == pytest.approx(1)
    assert (found["different_tokens"], found["tokens"]) == (0, 6)
    assert workload.step_bytes(1) == 4 * (workload.shared_weights + workload.top_k * workload.expert_weights)


def test_policy(tmp_path: Path) -> None:
    printed, shown, messages = bench("policy", tmp_path)
    check_plot(tmp_path, "policy", messages)
    assert "within 15% of the best: the policy in" in shown
    assert {(cell["shards"], cell["rows"], cell["hidden"]) for cell in printed["results"]} == {(2, 8, 64)}
    for cell in printed["results"]:
        assert cell["times_best"] == pytest.approx(cell["ms"][cell["chosen"]] / min(cell["ms"].values()))
        assert cell["ms"][cell["best"]] == min(cell["ms"].values())


def test_schedule(tmp_path: Path) -> None:
    printed, shown, messages = bench("schedule", tmp_path)
    check_plot(tmp_path, "schedule", messages)
    assert "round robin" in shown
    assert printed["balance"]["fewest requests"] >= 0.9
    assert printed["balance"]["fewest requests"] > printed["balance"]["round robin"]
    for result in printed["results"]:
        check_time(result["plan"])
        check_time(result["landed"])


def test_serve(tmp_path: Path) -> None:
    printed, shown, messages = bench("serve", tmp_path)
    check_plot(tmp_path, "serve", messages)
    assert "times the tokens/s" in shown
    assert printed["requests"] == 24
    for variant in printed["variants"].values():
        check_time(variant["makespan"])
        seconds = variant["makespan"]["ms"] / 1e3
        assert variant["tokens_per_second"] == pytest.approx(printed["output_tokens"] / seconds)
        assert variant["requests_per_second"] == pytest.approx(printed["requests"] / seconds)
        for name in ("first_token_ms", "between_tokens_ms"):
            assert 0 < variant[name]["p50"] <= variant[name]["p90"] <= variant[name]["p99"]
        assert 0 < variant["balance"] <= 1
        assert 0 <= variant["pad_share"] < 1
        assert 0 < variant["cache_use"] <= 1
        assert variant["preemptions"] == 0
    for ratio in printed["speedup"].values():
        assert ratio["lowest"] <= ratio["median"] <= ratio["highest"]
    assert printed["speedup"]["continuous"]["median"] == 1


def test_host(tmp_path: Path) -> None:
    printed, shown, messages = bench("host", tmp_path)
    check_plot(tmp_path, "host", messages)
    assert "update ms" in shown
    assert [result["decode_steps"] for result in printed["results"]] == [1, 8]
    for result in printed["results"]:
        parts = [result[part] for part in ("plan", "order", "put", "landing", "total")]
        for part in parts:
            check_time(part)


def test_quantization(tmp_path: Path) -> None:
    model = ROOT / "tests" / "goldens" / "qwen3_moe_gqa4_e8_top2"
    printed, shown, messages = bench("quantization", tmp_path, "--model", str(model))
    check_plot(tmp_path, "quantization", messages)
    assert "weights, KiB" in shown
    found = {result["weight_dtype"]: result for result in printed["results"]}
    exact, float8, int8 = (found[dtype] for dtype in ("exact", "float8_e4m3fn", "int8"))
    assert int8["weight_bytes"] == float8["weight_bytes"] < 0.5 * exact["weight_bytes"]
    assert exact["median"] == 0 < int8["median"] < float8["median"] < 0.3


def test_docs_scaling_has_the_current_predictions() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    predictions = list(scaling.predictions(["Qwen3-30B-A3B", "DeepSeek-V3"], [("h100", 8)]))
    assert [each.fits for each in predictions] == [True] * 3 + [False] * 3
    for text in (*map(str, predictions), *scaling.comparisons()):
        assert text in page


def test_memory(tmp_path: Path) -> None:
    printed, _, messages = bench("memory", tmp_path)
    check_plot(tmp_path, "memory", messages)
    assert [result["devices"] for result in printed["results"]] == [1, 8]
    for result in printed["results"]:
        assert result["peak"] > result["weights"] + result["cache"] > result["cache"] > 0
        assert 0.3 < result["plan"] < 3, "the process is small, so that Python and JAX take most of it"
        assert [compiled for _, compiled in result["answers"]][1] == 0, "the same prompt again compiles nothing"
