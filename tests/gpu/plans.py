"""Run `moe-jax` with the arguments of each line of the input, a JSON list."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from moe_jax.cli import main

for line in sys.stdin:
    sys.argv = ["moe-jax", *json.loads(line)]
    with suppress(SystemExit):
        main()
    sys.stdout.flush()
