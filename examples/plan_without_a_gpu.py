"""A decode step compiled for eight H100 GPUs that are not there: its collectives, bytes, memory and time.

Run it with `python examples/plan_without_a_gpu.py`. It needs XLA's GPU compiler, but neither a GPU nor CUDA; where the
compiler is missing, it says how to install it. `moe-jax plan --target h100` does the same from a shell.
"""

import sys

import jax

from moe_jax.analysis.explain import explain
from moe_jax.analysis.targets import COMPILER_OPTIONS, target_placement
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.errors import PlacementError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import as_hardware

TARGET = "h100"
jax.config.update("jax_platforms", "cpu")  # nothing runs, so nothing needs a GPU

checkpoint = Checkpoint(ADDER)  # only config.json is read; the weights need not be there
try:
    placement = target_placement(TARGET, "expert=8")
except PlacementError as error:
    sys.exit(str(error))
decoder = ShardedDecoder(checkpoint.config, placement, "bfloat16")
policy = decoder.policy(as_hardware(TARGET))
plan = explain(Programs(decoder, COMPILER_OPTIONS), policy, counts=[64] * 8, positions=64)  # 64 sequences on each GPU

print(plan)
for each in plan.collectives:
    print(f"{each.times} x {each.kind} over {each.devices} devices, each with {each.result}")
