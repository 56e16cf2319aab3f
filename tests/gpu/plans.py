"""Makes one plan after another: reads arguments of `moe-jax`, a JSON list on each line, and prints what it prints."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from moe_jax.cli import main

for segment in sys.stdin:
    sys.argv = ["moe-jax", *json.loads(segment)]
    with suppress(SystemExit):
        main()
    sys.stdout.flush()
