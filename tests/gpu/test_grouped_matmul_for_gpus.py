"""Grouped matmuls compiled by XLA's GPU compiler, without a GPU. Their values are tested in `tests/kernels`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMPILER = Path(sys.prefix) / "gpu-compiler"
HALF, SINGLE = "bfloat16", "float32"
CASES = [
    (of, target, dtype, rows, "exact")
    for target in ("h100", "a100", "b200")
    for dtype in (HALF, SINGLE)
    for of, rows in (("one", 2048), ("one", 64), ("one", 8), ("layers", 64))
] + [
    ("layers", target, HALF, 64, weights)
    for target in ("h100", "a100")
    for weights in ("int8", "float8", "float8 in blocks")
]
Case = tuple[str, str, str, int, str]


@pytest.fixture(scope="module")
def compiled() -> dict[Case, dict[str, Any]]:
    """Statistics of the compiled program of each case, from one process with the compiler on its path."""
    assert COMPILER.is_dir(), "the GPU compiler is not installed: run `make test`, or see its rule in the Makefile"
    paths = [str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    named = [dict(zip(("of", "target", "dtype", "rows", "weights"), case, strict=True)) for case in CASES]
    cases_json = "\n".join(map(json.dumps, named))
    command = [sys.executable, str(Path(__file__).with_name("compile_grouped_matmul.py"))]
    done = subprocess.run(command, env=environment, check=True, input=cases_json, stdout=subprocess.PIPE, text=True)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_read_stacked_weights_in_place_and_expand_nothing(
    case: Case, compiled: dict[Case, dict[str, Any]]
) -> None:
    found = compiled[case]
    # Rows before and after padding, and tables; no copy of weights.
    assert found["temporary_bytes"] <= 2 * found["output_bytes"] + 2**16
    assert found["loops"] == (case[0] == "layers"), "a loop over blocks would wait for the host"
    assert found["kernels"] == ["__gpu$xla.gpu.triton"]
