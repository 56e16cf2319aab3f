"""A request, and what the scheduler knows of it."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from moe_jax.errors import RequestError

if TYPE_CHECKING:
    from moe_jax.scheduler.prefix import Node, Pool

NEVER = sys.maxsize
NEW: tuple[int, int] = (0, -1)
"""The place in the line of a request that was not added yet."""


class PageTable:
    """The pages of consecutive positions of one request, in one group of layers."""

    __slots__ = ("first", "ids", "pool")

    def __init__(self, pool: Pool, first: int, ids: array[int]) -> None:
        self.pool = pool
        """Where they are from."""
        self.first = first
        """Pages of the sequence that come before them."""
        self.ids = ids


class Request:
    """A prompt on its way to being continued. Two are never equal.

    Its last token is never fed back, so it has no position in the cache.

    Raises:
      RequestError: no prompt, or no token to generate.
    """

    __slots__ = (
        "allocated",
        "awaited",
        "cached",
        "computed",
        "decode_end",
        "ended",
        "id",
        "max_tokens",
        "node",
        "order",
        "pages",
        "priority",
        "prompt",
        "shard",
        "share_at",
        "shared",
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
            raise RequestError(f"request {id!r}: the prompt must have at least one token")
        if max_tokens < 1:
            raise RequestError(f"request {id!r}: there must be at least one token to generate, got {max_tokens}")
        self.id = id
        self.prompt = prompt
        self.max_tokens = max_tokens
        """Tokens to generate at most."""
        self.priority = priority
        """Each step of it overtakes at most `OVERTAKES` requests that came before."""
        self.shares_prefix = shares_prefix
        """Whether it reads and feeds the prefix cache. Whoever wants something of each prompt position does not."""
        self.tokens: list[int] = []
        """Generated, and known to the host."""
        self.computed = 0
        """Positions whose keys and values are written, or planned to be."""
        self.shard = self.slot = -1
        """-1 while it does not run."""
        self.pages: list[PageTable] = []
        """Of each group of layers, while it runs."""
        self.cached = 0
        """Positions that its last admission took from the prefix cache."""

        self.ended = False
        """Finished or cancelled."""
        self.order = NEW
        """Its place in the line."""
        self.decode_end = 0
        """Positions after the last that decode steps may be planned for; 0 until its known tokens are computed."""
        self.awaited = len(prompt)
        """Tokens of the sequence that are known or planned, where no decode steps are."""
        self.allocated = 0
        """Positions for which it has pages, in all groups."""
        self.node: Node | None = None
        """Where its first `shared` pages end in the prefix cache; `None` where it does not share."""
        self.shared = 0
        self.share_at = NEVER
        """How many tokens it must have for its next page to be shared."""

    @property
    def known(self) -> int:
        """Tokens of the sequence that the host knows."""
        return len(self.prompt) + len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens planned, not known yet. Each decode step feeds one and gives one."""
        return (self.computed + 1 if self.decode_end else self.awaited) - self.known

    @property
    def max_positions(self) -> int:
        """Positions of the cache that it can come to fill."""
        return len(self.prompt) + self.max_tokens - 1

    def sequence(self, start: int, end: int) -> tuple[int, ...]:
        """Some of the prompt and the known tokens."""
        prompt = len(self.prompt)
        if start >= prompt:
            return tuple(self.tokens[start - prompt : end - prompt])
        return (*self.prompt[start:end], *self.tokens[: max(end - prompt, 0)])
