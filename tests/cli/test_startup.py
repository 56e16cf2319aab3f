"""The command line answers help, version and mistakes without JAX, and says what it does."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax
from moe_jax import LLM
from moe_jax.analysis.targets import CHIPS
from moe_jax.cli.app import COMMANDS
from moe_jax.config.choices import COMBINES, GATHER_DTYPES, RESIDUAL_LAYOUTS, TARGETS
from moe_jax.sharding.encoding import ENCODINGS
from moe_jax.sharding.policy import STRATEGIES
from moe_jax.sharding.residual import RESIDUALS

HEAVY = ("jax", "flax", "orbax", "tokenizers", "numpy")
"""Modules that take long to import."""
PROGRAM = """
import sys
sys.argv = ["moe-jax", *{arguments}]
sys.modules["fcntl"] = None  # as on Windows
from moe_jax.cli import main
try:
    main()
finally:
    print("imported", *(name for name in {heavy} if name in sys.modules))
"""


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, "Decode Mixture-of-Experts"),
        (["-h"], 0, "Decode Mixture-of-Experts"),
        (["--version"], 0, f"moe-jax {importlib.metadata.version('moe_jax')}"),
        (["generate", "-h"], 0, "Continue prompts"),
        (["plan", "--help"], 0, "a100, h100"),
        (["generate", "--temprature", "1"], 2, "No such option"),
        (["generate", "--combine", "both"], 2, "Invalid value for '--combine'"),
        (["fly"], 2, "No such command"),
    ],
)
def test_help_version_and_mistakes_import_nothing_heavy(arguments: list[str], status: int, words: str) -> None:
    ended = run_python(PROGRAM.format(arguments=arguments, heavy=HEAVY))
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (status, "imported")
    assert words in ended.stdout + ended.stderr


def test_every_command_has_short_help() -> None:
    """One process for all commands: their help imports nothing heavy."""
    program = f"""
import sys
from typer.testing import CliRunner
from moe_jax.cli.app import app
for command in {list(COMMANDS)}:
    assert CliRunner().invoke(app, [command, "-h"]).exit_code == 0
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    assert run_python(program).stdout.strip() == ""


def test_names_of_choices_are_those_of_the_library() -> None:
    tables = (STRATEGIES, RESIDUALS, ENCODINGS, CHIPS)
    assert [tuple(table) for table in tables] == [COMBINES, RESIDUAL_LAYOUTS, GATHER_DTYPES, TARGETS]


def test_the_package_has_its_public_names_a_version_and_types() -> None:
    assert all(getattr(moe_jax, name) is not None for name in moe_jax.__all__)
    assert set(moe_jax.__all__) < set(dir(moe_jax))
    assert moe_jax.__version__ == importlib.metadata.version("moe_jax")
    assert (Path(moe_jax.__file__).parent / "py.typed").exists()
    for name in ("LM", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'moe_jax' has no attribute '{name}'"):
            getattr(moe_jax, name)


def test_rooms_are_attributes_of_the_package() -> None:
    code = "import moe_jax; print(moe_jax.errors.RequestError.__name__, moe_jax.sharding.Hardware.__name__)"
    assert run_python(code).stdout.split() == ["RequestError", "Hardware"]


def test_logs_go_to_standard_error_unless_quiet(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "1+1=", "temperature": 0}\n')
    command = [sys.executable, "-m", "moe_jax", "--cpu-devices", "1"]
    ended = subprocess.run([*command, "generate", "1+1=", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout)["outputs"]
    beginnings = ("adder in bfloat16 on data=1", "combine: ", "KV cache: ", "compiling the step")
    for line, words in zip(ended.stderr.splitlines()[: len(beginnings)], beginnings, strict=True):
        assert line.startswith(f"moe-jax: {words}")
    quiet = subprocess.run([*command, "generate", "1+1=", "-q"], capture_output=True, text=True, check=True)
    assert quiet.stderr == ""
    assert "1+1=" in quiet.stdout


def test_an_llm_describes_itself() -> None:
    with LLM(mesh="expert=2", dtype="float32") as llm:
        assert repr(llm).startswith(
            "<LLM adder in float32 on data=1,expert=2,tensor=1; tokens=data,expert; heads=tensor"
        )
        assert repr(llm).endswith("MiB of cache on each device>")
