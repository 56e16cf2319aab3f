"""Waiting queue: requests without a slot, by arrival and priority."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from enum import Enum, auto

from moe_jax.scheduler.request import NEW, Request

MAX_OVERTAKEN = 1000
"""Maximum number of earlier requests that one step of priority overtakes, so that no request waits forever."""
MAX_PASSED = 100
"""Maximum number of later requests that are admitted before one that lacks pages. None pass a preempted request."""
LOOK_AHEAD = 4
"""Number of requests of similar length that may lack pages before a plan stops looking for one that fits."""


class Admission(Enum):
    """Result of an attempt to admit a request."""

    ADMITTED = auto()
    NO_ROOM = auto()
    """No token shard has a free slot and rows."""
    MUST_WAIT = auto()
    """Earlier prompts can use all rows."""
    NO_PAGES = auto()
    """The token shards with room have too few pages."""


class WaitingQueue:
    """Priority queue of waiting requests. A preempted request returns to its old place.

    Prompts of similar length share a lane, so that a short prompt is found behind any number of long ones.
    """

    def __init__(self) -> None:
        self._lanes: defaultdict[int, list[tuple[tuple[int, int], Request]]] = defaultdict(list)
        """Heap of requests by order, for each power of four of prefill tokens.

        A request that ends while it waits stays until it is first.
        """
        self._arrivals = 0

    def __bool__(self) -> bool:
        return any(self._lanes.values())

    def add(self, request: Request) -> None:
        """Add a new request, whose `prefill_tokens` are set."""
        assert request.order == NEW, "each request is added once"
        request.order = (self._arrivals - request.priority * MAX_OVERTAKEN, self._arrivals)
        self._arrivals += 1
        self.push(request)

    def push(self, request: Request) -> None:
        """Return a preempted request to its place."""
        heapq.heappush(self._lanes[_lane(request)], (request.order, request))

    def admit(self, attempt: Callable[[Request], Admission]) -> None:
        """Attempt to admit requests in queue order, until there is no room.

        A lane closes for this plan when its first request must wait. Later requests pass a request that lacks pages,
        within the bounds of `LOOK_AHEAD` and `MAX_PASSED`. No request passes one with pending tokens.
        """
        closed: set[int] = set()
        passed: list[Request] = []
        passed_in_lane = Counter[int]()
        while not any(request.passed >= MAX_PASSED for request in passed):
            if (number := self._first_lane(closed)) is None:
                break
            lane = self._lanes[number]
            request = lane[0][1]
            admission = Admission.NO_ROOM if request.pending else attempt(request)
            if admission is Admission.NO_ROOM:
                break
            heapq.heappop(lane)
            match admission:
                case Admission.ADMITTED:
                    for earlier in passed:
                        earlier.passed += 1
                case Admission.MUST_WAIT:
                    self.push(request)  # into the lane of its new estimate
                    if _lane(request) == number:
                        closed.add(number)
                case Admission.NO_PAGES:
                    passed.append(request)
                    passed_in_lane[number] += 1
                    if passed_in_lane[number] == LOOK_AHEAD:
                        closed.add(number)
        for request in passed:
            self.push(request)

    def _first_lane(self, closed: set[int]) -> int | None:
        """Number of the lane of the first request in queue order, except for closed lanes; None if all are empty."""
        first: list[tuple[tuple[int, int], int]] = []
        for number, lane in self._lanes.items():
            while lane and lane[0][1].ended:
                heapq.heappop(lane)
            if lane and number not in closed:
                first.append((lane[0][0], number))
        return min(first)[1] if first else None


def _lane(request: Request) -> int:
    return request.prefill_tokens.bit_length() // 2
