"""What XLA's GPU compiler makes of grouped matmuls; no GPU is needed. Their numbers are tested in `tests/layers`."""

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
    """Of each case what the compiled program is, all found by one process that has the compiler on its path."""
    assert COMPILER.is_dir(), "the GPU compiler is not installed: run `make test`, or see its rule in the Makefile"
    paths = [str(COMPILER), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    named = [dict(zip(("of", "target", "dtype", "rows", "weights"), case, strict=True)) for case in CASES]
    flags = "\n".join(map(json.dumps, named))
    command = [sys.executable, str(Path(__file__).with_name("compile_grouped_matmul.py"))]
    done = subprocess.run(command, env=environment, check=True, input=flags, stdout=subprocess.PIPE, text=True)
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_read_weights_where_they_lie_and_nothing_is_expanded(
    case: Case, compiled: dict[Case, dict[str, Any]]
) -> None:
    found = compiled[case]
    # Besides rows before and after those beyond the groups are zero, only tables: no copy of weights, no expansion.
    assert found["temporary_bytes"] <= 2 * found["output_bytes"] + 2**16
    assert found["loops"] == (case[0] == "layers"), "a loop over blocks would wait for the host"
    assert found["kernels"] == ["__gpu$xla.gpu.triton"]
