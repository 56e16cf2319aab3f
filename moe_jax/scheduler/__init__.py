"""Continuous batching: assign requests to token shards and cache pages, and plan each step. Does not import jax."""

from moe_jax.scheduler.diffusion import DiffusionRequest, DiffusionScheduler
from moe_jax.scheduler.limits import CacheGroup, Limits
from moe_jax.scheduler.plan import Chunk, Decodes, Plan
from moe_jax.scheduler.request import Request, RequestPages
from moe_jax.scheduler.scheduler import Scheduler

__all__ = [
    "CacheGroup",
    "Chunk",
    "Decodes",
    "DiffusionRequest",
    "DiffusionScheduler",
    "Limits",
    "Plan",
    "Request",
    "RequestPages",
    "Scheduler",
]
