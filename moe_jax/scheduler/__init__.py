"""Which request runs where, on which pages of the cache, and what each step takes from it. Nothing here imports jax."""

from moe_jax.scheduler.diffusion import DiffusionRequest, DiffusionScheduler
from moe_jax.scheduler.limits import CacheGroup, Limits
from moe_jax.scheduler.plan import Chunk, Decodes, Plan
from moe_jax.scheduler.request import PageTable, Request
from moe_jax.scheduler.scheduler import Scheduler

__all__ = [
    "CacheGroup",
    "Chunk",
    "Decodes",
    "DiffusionRequest",
    "DiffusionScheduler",
    "Limits",
    "PageTable",
    "Plan",
    "Request",
    "Scheduler",
]
