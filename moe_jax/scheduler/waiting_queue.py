"""Waiting queue: requests without a slot, by arrival and priority."""

from __future__ import annotations

import heapq

from moe_jax.scheduler.request import NEW, Request

MAX_OVERTAKEN = 1000
"""Maximum number of earlier requests that one step of priority overtakes, so that no request waits forever."""


class WaitingQueue:
    """Priority queue of waiting requests. A preempted request returns to its old place."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        """Requests by order. A request that ends while it waits stays until it is first."""
        self._arrivals = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def add(self, request: Request) -> None:
        """Add a new request."""
        assert request.order == NEW, "each request is added once"
        request.order = (self._arrivals - request.priority * MAX_OVERTAKEN, self._arrivals)
        self._arrivals += 1
        self.push(request)

    def push(self, request: Request) -> None:
        """Return a preempted request to its place."""
        heapq.heappush(self._heap, (request.order, request))

    def first(self) -> Request | None:
        """Return the first request; `None` if the queue is empty, or if that request has pending tokens to wait for."""
        while self._heap and self._heap[0][1].ended:
            heapq.heappop(self._heap)
        request = self._heap[0][1] if self._heap else None
        return request if request and not request.pending else None

    def pop(self) -> None:
        """Remove the first request."""
        heapq.heappop(self._heap)
