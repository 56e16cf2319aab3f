"""The README says what is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.sharding import Placement

README = (Path(__file__).parents[1] / "README.md").read_text()
TABLE = re.findall(r"^\| `([^`]+)` \| [^|]+ \| (\w+) over ([^|]*?) \|$", README, re.MULTILINE)


def test_its_python_runs() -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=quickly).stdout
    assert printed.startswith("46 stop [")
    assert "(5, 16)" in printed
    assert "4 reduce-scatter" in printed
    assert printed.endswith("6912")


def test_the_table_of_placements_is_found() -> None:
    assert len(TABLE) == 6


@pytest.mark.parametrize(("text", "first", "axes"), TABLE)
def test_its_placements_combine_as_it_says(text: str, first: str, axes: str) -> None:
    placement = Placement.parse(text)
    scattered, _, summed = axes.partition(", then sum over ")
    words = {
        "all three": ("data", "expert", "tensor"),
        "expert and tensor": ("expert", "tensor"),
    }
    as_axes = lambda text: words.get(text) or ((text,) if text else ())  # noqa: E731
    expected = (as_axes(scattered), as_axes(summed)) if first == "scatter" else ((), as_axes(scattered))
    assert (placement.scatter_axes, placement.sum_axes) == expected
