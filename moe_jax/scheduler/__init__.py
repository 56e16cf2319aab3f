"""Which request runs where, on which pages of the cache, and what each step takes from it. Nothing here imports jax."""

from moe_jax.scheduler.blocks import BlockRequest, BlockScheduler
from moe_jax.scheduler.limits import CacheGroup, Limits
from moe_jax.scheduler.plan import Chunk, Decodes, Plan
from moe_jax.scheduler.request import Request, Table
from moe_jax.scheduler.scheduler import Scheduler

__all__ = [
    "BlockRequest",
    "BlockScheduler",
    "CacheGroup",
    "Chunk",
    "Decodes",
    "Limits",
    "Plan",
    "Request",
    "Scheduler",
    "Table",
]
