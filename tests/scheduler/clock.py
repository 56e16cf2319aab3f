"""Scheduler whose plans are counted, with the limits of a usual engine.

Each plan is a step: its tokens are known before the next plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_jax.scheduler import CacheGroup, Limits, Plan, Request, Scheduler

GIANT, SHORT, ROWS = 32_768, 10, 512
STEPS = GIANT // ROWS
"""Steps of a giant prompt that is alone."""
SOON = 3
"""Maximum number of plans until a short prompt begins."""


class Clock:
    """Scheduler whose plans are counted.

    Attributes:
      began: number of plans from the arrival of each request to its first chunk, that plan included.
      ended: number of plans from the arrival of each request to the end of its prefill.
    """

    def __init__(self, **changed: Any) -> None:
        engine: dict[str, Any] = {
            "shards": 1, "slots": 64, "page": 16, "groups": (CacheGroup(40_000, None),), "max_chunk_tokens": ROWS,
            "max_prefills": 8, "max_rows": ROWS, "decode_steps": 8, "prefix_cache": True,
        }  # fmt: skip
        self.scheduler = Scheduler(Limits(**engine | changed))
        self.plans = 0
        self.arrived: dict[Request, int] = {}
        self.began: dict[Request, int] = {}
        self.ended: dict[Request, int] = {}

    def add(self, length: int, priority: int = 0, max_tokens: int = 4) -> Request:
        number = len(self.arrived)
        request = Request(number, [number] * length, max_tokens, priority)
        self.scheduler.add(request)
        self.arrived[request] = self.plans
        return request

    def step(self) -> Plan:
        plan = self.scheduler.plan()
        self.plans += 1
        for chunks in plan.chunks:
            for chunk in chunks:
                self.began.setdefault(chunk.request, self.plans - self.arrived[chunk.request])
                if chunk.samples:
                    self.ended.setdefault(chunk.request, self.plans - self.arrived[chunk.request])
        self.scheduler.update_from_output(plan, {request: [0] * count for request, count in plan.planned_tokens()})
        return plan

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def latest_begin(self, requests: Sequence[Request]) -> int:
        """Run until all requests have begun; return the longest wait."""
        while not all(request in self.began for request in requests):
            self.step()
        return max(self.began[request] for request in requests)

    def latest_end(self, requests: Sequence[Request]) -> int:
        """Run until the prefill of all requests has ended; return the longest time."""
        while not all(request in self.ended for request in requests):
            self.step()
        return max(self.ended[request] for request in requests)
