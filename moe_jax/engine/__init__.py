"""Continuous batching: requests arrive and end at any step, and are decoded together.

options.py           sizes and limits that follow from the options of an engine
cache_plan.py        cache pages and maximum length that the free memory allows
make_engine.py       the engine that the settings and the cache make
engine.py            the loop: schedule a step, dispatch it, read the step before
sizes.py             the few shapes of steps that are compiled
step_inputs.py       from a scheduler's plan to host arrays; diffusion_inputs.py for block diffusion
executor.py          weights, caches and slots on the devices
step_outputs.py      from the devices' results to the outputs of requests
generation.py        one sample of a request; detokenizer.py makes its text
outputs.py           results for users
stats.py             throughput and latencies
distributed/         several processes
"""

from moe_jax.config.engine_options import Options
from moe_jax.engine.cache_plan import CachePlan, Pages, log_plan, plan_cache
from moe_jax.engine.engine import Engine
from moe_jax.engine.generation import Generation
from moe_jax.engine.make_engine import make_engine
from moe_jax.engine.options import make_limits, make_sizes
from moe_jax.engine.output_queue import OutputQueue
from moe_jax.engine.stats import Latency, Stats

__all__ = [
    "CachePlan",
    "Engine",
    "Generation",
    "Latency",
    "Options",
    "OutputQueue",
    "Pages",
    "Stats",
    "log_plan",
    "make_engine",
    "make_limits",
    "make_sizes",
    "plan_cache",
]
