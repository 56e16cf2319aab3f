"""Plan of one dispatch: the scheduler's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from moe_jax.scheduler.request import Request


class Decodes:
    """Requests of a token shard that decode in a dispatch: parallel lists with one entry for each request."""

    __slots__ = ("positions", "requests", "steps", "width")

    def __init__(self, width: int = 1) -> None:
        self.width = width
        """Rows of each request in a step."""
        self.requests: list[Request] = []
        """Requests, in queue order."""
        self.positions: list[int] = []
        """Position of each request in the first step.

        That step feeds the last token of the request, which the host may not know yet.
        """
        self.steps: list[int] = []
        """Maximum number of decode steps of each request, at most the plan's. The request has pages for these only."""

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[tuple[Request, int, int]]:
        return zip(self.requests, self.positions, self.steps, strict=True)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one request in a prefill step.

    After a preemption, prefill also recomputes the tokens that the request generated.
    """

    request: Request
    start: int
    """Position of the first token."""
    end: int
    """Position after the last token."""
    samples: bool
    """True if the chunk ends with the last known token, so that the step samples the next one."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One dispatch; false if there is nothing to run. Plans must run in the order in which they were made.

    The page tables (`Request.pages`), slots and shards of its requests are valid until the next call of the scheduler.
    """

    decodes: list[Decodes]
    """Decoding requests of each token shard."""
    steps: int
    """Number of decode steps; 1 if there are chunks."""
    chunks: list[list[Chunk]]
    """Prefill chunks of each token shard, in the order of admission."""

    def __bool__(self) -> bool:
        return any(self.decodes) or any(self.chunks)

    def planned_tokens(self) -> Iterator[tuple[Request, int]]:
        """Iterate over the requests that the plan generates tokens for, each with the number of tokens."""
        for decodes in self.decodes:
            yield from zip(decodes.requests, decodes.steps, strict=True)
        for chunk in chain(*self.chunks):
            if chunk.samples:
                yield chunk.request, 1

    @property
    def rows(self) -> list[int]:
        """Number of rows of each token shard in the first step."""
        return [
            len(decodes) * decodes.width + sum(chunk.end - chunk.start for chunk in chunks)
            for decodes, chunks in zip(self.decodes, self.chunks, strict=True)
        ]
