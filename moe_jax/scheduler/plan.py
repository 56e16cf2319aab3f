"""What the device is to do next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from moe_jax.scheduler.request import Request


class Decodes:
    """The requests of a token shard that take decode steps in a dispatch, as lists of one entry each, in order."""

    __slots__ = ("positions", "requests", "steps", "width")

    def __init__(self, width: int = 1) -> None:
        self.width = width
        """Rows of each in a step."""
        self.requests: list[Request] = []
        self.positions: list[int] = []
        """Of the first step, which feeds the token that the request got last, known to the host or not."""
        self.steps: list[int] = []
        """Steps that each takes part in, at most the plan's. There are no pages for more."""

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[tuple[Request, int, int]]:
        return zip(self.requests, self.positions, self.steps, strict=True)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request, prompt and those that it generated before it was preempted."""

    request: Request
    start: int
    end: int
    samples: bool
    """Whether they are the last that are known, so that the step gives a token."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One dispatch; false where there is nothing to do. All that are made must run, in the order of their making.

    Tables of pages (`Request.pages`), slots and shards of its requests are right until the scheduler is called again.
    """

    decodes: list[Decodes]
    """Of each token shard."""
    steps: int
    """Decode steps; 1 where there are chunks."""
    chunks: list[list[Chunk]]
    """Of each token shard, in the order of admission."""

    def __bool__(self) -> bool:
        return any(self.decodes) or any(self.chunks)

    def planned_tokens(self) -> Iterator[tuple[Request, int]]:
        """Each request that tokens are planned for, with how many."""
        for decodes in self.decodes:
            yield from zip(decodes.requests, decodes.steps, strict=True)
        for chunk in chain(*self.chunks):
            if chunk.samples:
                yield chunk.request, 1

    @property
    def rows(self) -> list[int]:
        """Of each token shard, in the first step."""
        return [
            len(decodes) * decodes.width + sum(chunk.end - chunk.start for chunk in chunks)
            for decodes, chunks in zip(self.decodes, self.chunks, strict=True)
        ]
