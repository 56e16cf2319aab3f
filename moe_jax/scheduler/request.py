"""Request and its scheduling state."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from moe_jax.errors import RequestError
from moe_jax.scheduler.page_pool import PagePool
from moe_jax.scheduler.prefix_tree import PrefixNode

NEVER = sys.maxsize
NEW: tuple[int, int] = (0, -1)
"""Queue order of a request that was not added yet."""


class RequestPages:
    """Page table of one request in one cache group: pages of consecutive positions."""

    __slots__ = ("first", "ids", "pool")

    def __init__(self, pool: PagePool, first: int, ids: array[int]) -> None:
        self.pool = pool
        """Pool that the pages belong to."""
        self.first = first
        """Index of the first page in the sequence: the window has passed the pages before it."""
        self.ids = ids
        """Page ids."""


@dataclass(eq=False, repr=False, slots=True)
class Request:
    """Prompt to continue, with its scheduling state. Requests compare by identity.

    The last generated token is never fed back, so it has no position in the cache.

    Raises:
      RequestError: an empty prompt, or no token to generate.
    """

    id: Hashable
    """Id of the request, unique among the requests that have not ended."""
    prompt: Sequence[int]
    """Token ids of the prompt."""
    max_tokens: int
    """Maximum number of tokens to generate."""
    priority: int = 0
    """Priority in the waiting queue: each step overtakes at most `MAX_OVERTAKEN` earlier requests."""
    shares_prefix: bool = True
    """Read from and write to the prefix cache. False computes every prompt position, so each has an output."""

    tokens: list[int] = field(default_factory=list, init=False)
    """Generated tokens that the host knows."""
    computed: int = field(default=0, init=False)
    """Number of positions whose keys and values are written, or planned to be."""
    shard: int = field(default=-1, init=False)
    """Index of the token shard; -1 while the request does not run."""
    slot: int = field(default=-1, init=False)
    """Slot on the token shard; -1 while the request does not run."""
    pages: list[RequestPages] = field(default_factory=list, init=False)
    """Page table in each cache group; empty while the request does not run."""
    cached: int = field(default=0, init=False)
    """Number of positions that the last admission took from the prefix cache."""
    ended: bool = field(default=False, init=False)
    """True once the request is finished or cancelled."""

    order: tuple[int, int] = field(default=NEW, init=False)
    """Order in the waiting queue, and among running requests."""
    prefill_tokens: int = field(default=0, init=False)
    """Number of tokens that prefill will compute, estimated while the request waits."""
    passed: int = field(default=0, init=False)
    """Number of later requests that were admitted while this one lacked pages; `MAX_PASSED` after a preemption."""
    decode_end: int = field(default=0, init=False)
    """Position up to which decode steps may be planned; 0 during prefill."""
    planned_length: int = field(default=0, init=False)
    """Length of the sequence, known and planned, before any decode step."""
    allocated: int = field(default=0, init=False)
    """Number of positions that have pages in all cache groups."""
    prefix_node: PrefixNode | None = field(default=None, init=False)
    """Prefix node of the first `prefix_pages` pages; `None` if the request does not share its prefix."""
    prefix_pages: int = field(default=0, init=False)
    """Number of full pages of the request that the prefix tree contains."""
    cache_next_at: int = field(default=NEVER, init=False)
    """Number of generated tokens at which the next page can be cached."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise RequestError(f"request {self.id!r}: the prompt must have at least one token, got none")
        if self.max_tokens < 1:
            raise RequestError(f"request {self.id!r}: max_tokens must be 1 or more, got {self.max_tokens}")
        self.planned_length = len(self.prompt)

    @property
    def known(self) -> int:
        """Length of the sequence that the host knows: prompt and generated tokens."""
        return len(self.prompt) + len(self.tokens)

    @property
    def pending(self) -> int:
        """Number of tokens that are planned but not known. Each decode step feeds one token and generates one."""
        return (self.computed + 1 if self.decode_end else self.planned_length) - self.known

    @property
    def max_positions(self) -> int:
        """Maximum number of cache positions of the request."""
        return len(self.prompt) + self.max_tokens - 1

    def sequence(self, start: int, end: int) -> tuple[int, ...]:
        """Return tokens `start` to `end` of the known sequence."""
        prompt = len(self.prompt)
        if start >= prompt:
            return tuple(self.tokens[start - prompt : end - prompt])
        return (*self.prompt[start:end], *self.tokens[: max(end - prompt, 0)])
