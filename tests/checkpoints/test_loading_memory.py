"""Loading keeps its memory bound: about one layer beyond the memory of the parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic

HERE = Path(__file__).parent
RETURN_MEMORY_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Make the C library return freed memory at once: memory that it keeps would count as used."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    path = tmp_path_factory.mktemp("synthetic") / "model"
    return path, synthetic.write(path)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("mesh", ["expert=2,tensor=4", "data=2,expert=4"])
def test_loading_needs_less_than_1_3_layers_beyond_the_parameters(checkpoint: tuple[Path, int], mesh: str) -> None:
    path, layer = checkpoint
    command = [sys.executable, str(HERE / "load_and_measure.py"), str(path), mesh]
    printed = subprocess.run(
        command, env=os.environ | RETURN_MEMORY_AT_ONCE, check=True, capture_output=True, text=True
    ).stdout
    measured = json.loads(printed)
    assert measured["taken"] - measured["held"] < 1.3 * layer
