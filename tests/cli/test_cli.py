"""The command line, run in this process as a user would type it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.flax import load_file, save_file

from moe_jax import cli
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.cli.options import CombineName, GatherDtype, ResidualName
from moe_jax.config import WeightDtype
from moe_jax.sharding.encoding import ENCODINGS
from moe_jax.sharding.hardware import KNOWN, as_hardware, save
from moe_jax.sharding.policy import STRATEGIES
from moe_jax.sharding.residual import RESIDUALS

GOLDEN = str(Path(__file__).parents[1] / "goldens" / "qwen3_moe_gqa4_e8_top2")
MEMBER = ("--num-processes", "2", "--process-id")


class Run:
    """Calls `moe-jax` and keeps what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.status, self.out, self.err = 0, "", ""

    def __call__(self, *arguments: str) -> Run:
        self._monkeypatch.setattr(sys, "argv", ["moe-jax", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        self.status = int(ended.value.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return self

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(monkeypatch, capsys)


def test_generate_without_arguments_shows_how_it_decodes() -> None:
    """In a process of its own, so that the command sets up its devices itself."""
    shown = subprocess.run(
        [sys.executable, "-c", "from moe_jax.cli import main; main()", "generate", "--temperature", "0"],
        check=True, capture_output=True, text=True, env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    ).stdout  # fmt: skip
    for words in (
        "12+34=46",
        "9999+1=10000",
        "8 x cpu (virtual)",
        "ScatterCombine: tokens and",
        "4 reduce-scatter",
        "tokens/s",
    ):
        assert words in shown
    assert "all-reduce" not in shown


def test_generate_json(run: Run) -> None:
    printed = run("generate", "2+3=", "40+2=", "--combine", "reduce", "--mesh", "expert=2", "--json").json
    assert [output["text"] for output in printed["outputs"]] == ["5", "42"]
    assert printed["route"] == "ReduceCombine"
    assert printed["collectives_per_step"] == {"all-gather": 8, "all-reduce": 4}
    assert printed["tokens_per_second"] > 0


def test_plan_counts_weights_in_eight_bits(run: Run) -> None:
    exact, eight = (
        run("plan", "--mesh", "expert=2", "--weight-dtype", dtype, "--json").json["weight_bytes"]
        for dtype in (WeightDtype.EXACT, WeightDtype.INT8)
    )
    assert 0.5 * exact < eight < 0.55 * exact


def test_selftest_scores_both_combines_alike(run: Run) -> None:
    printed = run("selftest", "--problems", "16", "--mesh", "expert=4", "--json").json
    assert printed["same_answers"]
    assert printed["exact_match"]["scatter"] == printed["exact_match"]["reduce"] >= 0.97


def test_plan_needs_no_weights(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(GOLDEN) / "config.json").read_bytes())
    printed = run("plan", "--model", str(tmp_path), "--mesh", "data=2,expert=4", "--rows", "4", "--json").json
    assert printed["placement"].startswith("data=2,expert=4,tensor=1")
    (scatter,) = (cost for cost in printed["candidates"] if cost["route"] == "ScatterCombine")
    assert scatter["combine_bytes"] == 2 * 3 * 4 * 32 * 4
    assert "ScatterCombine" in run("plan", "--model", str(tmp_path)).out


def test_bench_measures_and_calibrates(run: Run, tmp_path: Path) -> None:
    record = tmp_path / "mine.json"
    printed = run("bench", "--repeats", "2", "--calibrate", str(record), "--json").json
    assert Counter(row["collective"] for row in printed["collectives"]) == {
        "all-gather": 4,
        "reduce-scatter": 4,
        "all-reduce": 4,
    }
    assert as_hardware(str(record)).launch == printed["hardware"]["launch"]
    assert all(row["seconds"] > 0 and row["reckoned_seconds"] > 0 for row in printed["collectives"])
    assert "modelled as cpu" in run("plan", "--hardware", str(record)).out
    assert "nothing is scattered" in run("bench", "--mesh", "data=8").err
    assert "there is no directory" in run("bench", "--calibrate", str(tmp_path / "none" / "mine.json")).err


def test_plan_says_what_does_not_fit(run: Run, tmp_path: Path) -> None:
    raw = json.loads((Path(GOLDEN) / "config.json").read_text()) | {"max_position_embeddings": 2**20}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    small = replace(KNOWN["h100"], memory=2**28)
    save(small, tmp_path / "small.json")
    arguments = ["plan", "--model", str(tmp_path), "--mesh", "expert=2", "--hardware", str(tmp_path / "small.json")]
    assert "exceeds 256.00 MiB free (1/" in run(*arguments, "--rows", "64").out
    printed = run(*arguments, "--rows", "1", "--max-length", "64", "--json").json
    assert printed["fits"]
    assert printed["memory_bytes"] == sum(printed[f"{part}_bytes"] for part in ("weight", "cache", "temporary"))
    save(replace(small, memory=2**10), tmp_path / "small.json")
    plan = run(*arguments, "--max-length", "64").out
    assert "the weights alone need" in plan
    assert "engine       cannot start: there is room for 0 pages" in plan


def test_train_then_convert_there_and_back(run: Run, tmp_path: Path) -> None:
    there, orbax, back = (str(tmp_path / name) for name in ("model", "orbax", "back"))
    assert run("train", there, "--steps", "2", "--batch-size", "8", "--mesh", "expert=2", "--json").json["steps"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (output,) = run("generate", "1+1=", "--model", there, "--mesh", "expert=2", "--json").json["outputs"]
    assert output["token_ids"]
    assert run("convert", there, orbax, "--to", "orbax").status == 0
    assert run("convert", orbax, back, "--to", "huggingface", "--mesh", "tensor=2").status == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "back")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "/nowhere", "1+1="], "/nowhere is no directory"),
        (["generate", "--model", GOLDEN], "give prompts to continue"),
        (["generate", "one"], "has text that the tokenizer has no token for"),
        (["train", GOLDEN], "exists already"),
        (["train", ""], "exists already"),
        (["train", "/dev/null/x"], "Not a directory"),
        (["convert", GOLDEN, "/dev/null/x", "--to", "orbax"], "Not a directory"),
        (["plan", "--target", "h99"], "no target 'h99': the targets are a100, h100, h200, b200, gb200"),
        (["plan", "--target", "h100", "--mesh", "expert=12"], "12 devices do not fill hosts of 8 h100"),
        (["plan", "--target", "h100", "--mesh", "expert=0"], "needs at least one device of h100, got 0"),
        (["plan", "--counts", "1,2"], "--counts needs a number for each of 8 token shards"),
        (["plan", "--counts", "1,1,1,1,1,1,1,-1"], "--counts needs a number for each of 8 token shards"),
        (["plan", "--hardware", "abacus"], "no hardware 'abacus': give one of a100"),
        (["plan", "--max-length", "65"], "max_length must be from 1 to the 64 positions"),
        (["generate", "--model", GOLDEN, "a"], "no tokenizer.json"),
        (["generate", "1+1=", "--mesh", "expert=5"], "8 experts do not divide over 5 devices"),
        (["generate", "1+1=", "--mesh", "expert=99"], "needs 99 devices, there are 8"),
        (["generate", "1+1=", "--max-tokens", "-1"], "max_tokens must be 0 or more, got -1"),
        (["generate", "1+1=", "--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
        (["generate", "1+1=", "--dtype", "int4"], "dtype must be bfloat16, float16 or float32, got 'int4'"),
        (["generate", "1" * 65], "prompt 0 has 65 tokens, a sequence can have 64"),
        (["generate", ""], "prompt 0 is empty"),
        (["convert", GOLDEN, GOLDEN, "--to", "orbax"], "exists already"),
        (
            ["generate", "--coordinator", "localhost:1"],
            "the number of processes and the number of this process together",
        ),
        (
            ["generate", "--distributed", "--num-processes", "2"],
            "and the number of this process together, or none of them",
        ),
        (
            ["generate", *MEMBER, "2", "--coordinator", "localhost:1"],
            "the number of this process must be from 0 to 1 for 2 processes, got 2",
        ),
        (
            ["generate", *MEMBER, "0", "--coordinator", "localhost"],
            "the coordinator must be the HOST:PORT of process 0, such as 10.0.0.1:1234, got",
        ),
        (["generate", "--distributed"], "the processes cannot be joined"),
        (["plan", "--model", GOLDEN, "--mesh", "tensor=3"], "8 attention heads do not divide over 3 devices"),
    ],
)
def test_mistakes_are_one_line_and_status_1(run: Run, arguments: list[str], message: str) -> None:
    run("-q", *arguments)
    assert run.status == 1
    assert run.err.startswith("moe-jax: ")
    assert message in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [([], [], "INFO"), (["-v"], [], "DEBUG"), ([], ["-v"], "DEBUG"), (["-q"], [], "WARNING"), ([], ["-q"], "WARNING")],
)
def test_the_log_is_chosen_before_or_after_the_command(
    run: Run, before: list[str], after: list[str], level: str
) -> None:
    run(*before, "plan", "--hardware", "abacus", *after)
    assert logging.getLevelName(logging.getLogger("moe_jax").level) == level
    *details, last = run.err.splitlines()
    assert last.startswith("moe-jax: no hardware 'abacus'")
    assert any("Traceback" in line for line in details) == (level == "DEBUG")
    assert run.out == ""


def test_an_interrupt_is_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_jax.analysis.calibration.measure", interrupt)
    assert run("bench").status == 130
    assert "Traceback" not in run.err


def test_a_prompt_that_fails_is_status_1(run: Run, tmp_path: Path) -> None:
    """The weights of the last norm are finite, but the logits overflow."""
    shutil.copytree(ADDER, tmp_path / "model")
    tensors = load_file(ADDER / "model.safetensors")
    save_file({name: value * 1e38 if name == "model.norm.weight" else value for name, value in tensors.items()},
              tmp_path / "model" / "model.safetensors")  # fmt: skip
    arguments = ("--model", str(tmp_path / "model"), "--mesh", "expert=1", "--temperature", "0")
    assert run("-q", "generate", "1+1=", *arguments).status == 1
    assert run.err == "    failed: the model's logits are not finite: check its weights, or use a wider dtype\n"
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}))
    (tmp_path / "text").write_text("1+1=2")
    for arguments in (("--answers", str(tmp_path / "answers.jsonl")), ("--text", str(tmp_path / "text"))):
        run("-q", "eval", *arguments, "--model", str(tmp_path / "model"), "--mesh", "expert=1")
        assert (run.status, run.out) == (1, "")
        assert "the model's logits are not finite" in run.err


def test_errors_of_the_operating_system_name_the_file(run: Run) -> None:
    assert run("eval", "--text", "/nowhere").err == "moe-jax: No such file or directory: '/nowhere'\n"
    assert run("eval", "--answers", "/").err == "moe-jax: Is a directory: '/'\n"


@pytest.mark.parametrize("arguments", [["generate", "--combine", "both"], ["selftest", "--problems", "0"], ["fly"]])
def test_unknown_words_are_refused_with_usage(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).status == 2
    assert "Usage" in run.err


def test_options_offer_what_there_is() -> None:
    for option, known in ((CombineName, STRATEGIES), (ResidualName, RESIDUALS)):
        assert {name.value for name in option} == {"auto", *known}
    assert {name.value for name in GatherDtype} == set(ENCODINGS)
