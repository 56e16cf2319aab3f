"""Which request sits where, and which tokens a step takes from each. Nothing here imports jax."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Seat:
    """The place of a request for as long as it runs: a slot of a token shard's cache."""

    shard: int
    slot: int


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one request in one step."""

    request: int
    seat: Seat
    start: int
    """The position of the first of them in its sequence."""
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        """The position after the last of them."""
        return self.start + len(self.tokens)


def assign_seats(lengths: Sequence[int], shards: int) -> list[Seat]:
    """A seat for each request: as many requests on every shard (give or take one), and tokens as even as greedy makes
    them.

    The longest prompts choose first; each goes to the shard with the fewest requests, then the fewest tokens.
    """
    load = [(0, 0, shard) for shard in range(shards)]
    seats: dict[int, Seat] = {}
    for request in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        slot, tokens, shard = heapq.heappop(load)
        seats[request] = Seat(shard, slot)
        heapq.heappush(load, (slot + 1, tokens + lengths[request], shard))
    return [seats[request] for request in range(len(lengths))]


def prefill_steps(prompts: Sequence[Sequence[int]], seats: Sequence[Seat], chunk: int) -> Iterator[list[Segment]]:
    """The prompts cut into steps of at most `chunk` tokens of each."""
    for start in range(0, max(map(len, prompts)), chunk):
        yield [
            Segment(request, seat, start, prompt[start : start + chunk])
            for request, (prompt, seat) in enumerate(zip(prompts, seats, strict=True))
            if start < len(prompt)
        ]
