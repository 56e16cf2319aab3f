"""Python code of the README and of the usage page runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(page: str, then: str = "") -> str:
    """Run all Python blocks of a page as one program, on eight virtual devices. Return the output."""
    code = "".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)) + then
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_python_of_the_readme_runs() -> None:
    printed = run_python("README.md")
    assert printed.startswith("46 stop [")
    assert "\n(4,)\n" in printed
    assert "4 reduce-scatter" in printed
    assert printed.endswith("6912")


def test_python_of_the_usage_page_runs() -> None:
    assert run_python("docs/usage.md", "print(y.shape, load.assignments.sum())") == "(16, 32) 32.0\n"
