"""Every example runs and prints its result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
GPU_COMPILER = Path(sys.prefix) / "gpu-compiler"
"""XLA's GPU compiler, installed by the Makefile."""
OUTPUTS = {
    "moe_in_your_model": r"step 100: loss 0\.0",
    "batched_decode": r"\n999\+1234=2233  \(stop",
    "streaming_asyncio": r"(?s)\nbob: 1234\+5678=6912\n.*all users are served",
    "scoring": r"\n3 of 3 right",
    "several_processes": r"\n1000 from 4 devices of 2 processes",
    "plan_without_a_gpu": r"\n4 x reduce-scatter over 8 devices",
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(OUTPUTS)


@pytest.mark.parametrize("name", OUTPUTS)
def test_example(name: str) -> None:
    paths = [str(GPU_COMPILER)] if name == "plan_without_a_gpu" else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert result.returncode == 0, result.stderr
    assert re.search(OUTPUTS[name], result.stdout), result.stdout
    if name == "moe_in_your_model":
        first, *_, last = map(float, re.findall(r"loss (\S+)", result.stdout))
        assert last < 0.1 * first


@pytest.mark.parametrize("name", OUTPUTS)
def test_example_is_short_and_says_how_to_run_it(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    docstring, code = text.split('"""', 2)[1:]
    assert f"python examples/{name}.py" in docstring
    assert len([line for line in code.splitlines() if line.strip()]) <= 50
