"""Request and its scheduling state."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence

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


class Request:
    """Prompt to continue, with its scheduling state. Requests compare by identity.

    The last generated token is never fed back, so it has no position in the cache.

    Raises:
      RequestError: an empty prompt, or no token to generate.
    """

    __slots__ = (
        "allocated",
        "cache_next_at",
        "cached",
        "computed",
        "decode_end",
        "ended",
        "id",
        "max_tokens",
        "order",
        "pages",
        "planned_length",
        "prefix_node",
        "prefix_pages",
        "priority",
        "prompt",
        "shard",
        "shares_prefix",
        "slot",
        "tokens",
    )  # fmt: skip

    def __init__(
        self,
        id: Hashable,
        prompt: Sequence[int],
        max_tokens: int,
        priority: int = 0,
        shares_prefix: bool = True,
    ) -> None:
        if not len(prompt):
            raise RequestError(f"request {id!r}: the prompt must have at least one token, got none")
        if max_tokens < 1:
            raise RequestError(f"request {id!r}: max_tokens must be 1 or more, got {max_tokens}")
        self.id = id
        self.prompt = prompt
        self.max_tokens = max_tokens
        """Maximum number of tokens to generate."""
        self.priority = priority
        """Priority in the waiting queue: each step overtakes at most `MAX_OVERTAKEN` earlier requests."""
        self.shares_prefix = shares_prefix
        """Read from and write to the prefix cache. False computes every prompt position, so each has an output."""
        self.tokens: list[int] = []
        """Generated tokens that the host knows."""
        self.computed = 0
        """Number of positions whose keys and values are written, or planned to be."""
        self.shard = self.slot = -1
        """Token shard and slot; -1 while the request does not run."""
        self.pages: list[RequestPages] = []
        """Page table in each cache group, while the request runs."""
        self.cached = 0
        """Number of positions that the last admission took from the prefix cache."""

        self.ended = False
        """True once the request is finished or cancelled."""
        self.order = NEW
        """Order in the waiting queue, and among running requests."""
        self.decode_end = 0
        """Position up to which decode steps may be planned; 0 during prefill."""
        self.planned_length = len(prompt)
        """Length of the sequence, known and planned, before any decode step."""
        self.allocated = 0
        """Number of positions that have pages in all cache groups."""
        self.prefix_node: PrefixNode | None = None
        """Prefix node of the first `prefix_pages` pages; `None` if the request does not share its prefix."""
        self.prefix_pages = 0
        """Number of full pages of the request that the prefix tree contains."""
        self.cache_next_at = NEVER
        """Number of generated tokens at which the next page can be cached."""

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
