"""The README's Python code runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_its_python_runs() -> None:
    code = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=quickly).stdout
    assert printed.startswith("46 stop [")
    assert "(5, 16)" in printed
    assert "4 reduce-scatter" in printed
    assert printed.endswith("6912")
