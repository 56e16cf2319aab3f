"""What a token shard can hold, and what a step can take."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class CacheGroup:
    """Layers that look back equally far, and so share the tables of their pages."""

    pages: int
    """Of each token shard."""
    window: int | None
    """Positions that a row sees, its own included; `None`: all before it."""

    def first_page(self, position: int, page: int) -> int:
        """The first page, of `page` positions each, that the row at a position sees."""
        return 0 if self.window is None else max(position - self.window + 1, 0) // page

    def max_pages(self, positions: int, rows: int, page: int) -> int:
        """The most pages that a sequence of so many positions needs at a time, if a dispatch feeds at most `rows` of
        them."""
        whole = -(-positions // page)
        if self.window is None:
            return whole
        seen = self.window - 1 + rows
        return min(whole, (seen + page - 2) // page + 1)


@dataclass(frozen=True)
class Limits:
    """What the device side offers.

    Raises:
      ConfigError: a number below 1.
    """

    shards: int
    slots: int
    """Requests that run at once on a token shard."""
    page: int
    """Positions of a page."""
    groups: tuple[CacheGroup, ...]
    chunk: int
    """The most prompt tokens of one request in a step."""
    chunks: int
    """The most requests of a token shard in prefill in one step."""
    rows: int
    """Rows of a token shard in one step: decode rows first, prompt tokens fill the rest. Decode rows are never held
    back, and a prompt that waits gets one token at least, so that a step has at most `max(rows, slots)` rows."""
    decode_steps: int
    """Decode steps of one dispatch."""
    prefix_cache: bool
    block: int = 1
    """Positions that are decoded, and written, together; chunks and rows of prompts are whole blocks."""

    def __post_init__(self) -> None:
        for name in ("shards", "slots", "page", "chunk", "chunks", "rows", "decode_steps", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("chunk", "rows"):
            if getattr(self, name) % self.block:
                raise ConfigError(f"{name} must be whole blocks of {self.block}, got {getattr(self, name)}")
        if not self.groups:
            raise ConfigError("there must be a group of layers to cache for")
        for group in self.groups:
            if group.pages < 1 or (group.window is not None and group.window < 1):
                raise ConfigError(f"a group needs at least one page, and a window of at least 1, got {group}")
