"""Make an engine from a planned cache."""

from __future__ import annotations

from functools import partial

from moe_jax.config.engine_options import Options
from moe_jax.engine.cache_plan import CachePlan
from moe_jax.engine.diffusion_input_builder import DiffusionInputBuilder
from moe_jax.engine.distributed import ProcessGroup, SingleProcess
from moe_jax.engine.engine import Engine
from moe_jax.engine.executor import Executor
from moe_jax.engine.input_builder import StepInputBuilder
from moe_jax.engine.options import make_limits
from moe_jax.models import Parameters
from moe_jax.programs import Programs
from moe_jax.scheduler import DiffusionScheduler, Scheduler
from moe_jax.sharding import Policy


def make_engine(
    options: Options,
    cache: CachePlan,
    programs: Programs,
    parameters: Parameters,
    policy: Policy,
    process_group: ProcessGroup | None = None,
) -> Engine:
    """Make an engine with empty caches."""
    decoder = programs.decoder
    executor = Executor(programs, parameters, policy, cache.sizes, cache.pages)
    limits = make_limits(options, decoder, cache.sizes, cache.pages)
    scheduler, builder = Scheduler, StepInputBuilder
    if decoder.config.diffusion is not None:
        scheduler, builder = DiffusionScheduler, partial(DiffusionInputBuilder, diffusion=decoder.config.diffusion)
    group = process_group or SingleProcess()
    return Engine(scheduler(limits), executor, cache.sizes, decoder.placement, builder, group)
