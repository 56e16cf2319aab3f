"""Capacity of the devices: cache pages, slots, and the size of a step."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.errors import ConfigError


@dataclass(frozen=True)
class CacheGroup:
    """Cache of the layers with one attention window. These layers share page tables."""

    pages: int
    """Number of pages on each token shard."""
    window: int | None
    """Number of positions that a row attends to, its own included; `None` for full attention."""

    def first_page(self, position: int, page: int) -> int:
        """Index of the first page, of `page` positions, that the row at `position` attends to."""
        return 0 if self.window is None else max(position - self.window + 1, 0) // page

    def max_pages(self, positions: int, rows: int, page: int) -> int:
        """Maximum number of pages that a sequence of `positions` holds at a time.

        Args:
          positions: length of the sequence.
          rows: maximum number of its rows in one dispatch.
          page: positions in a page.
        """
        all_pages = -(-positions // page)
        if self.window is None:
            return all_pages
        visible = self.window - 1 + rows
        return min(all_pages, (visible + page - 2) // page + 1)


@dataclass(frozen=True)
class Limits:
    """Capacity that the scheduler plans for.

    Raises:
      ConfigError: a number below 1, or one that is not a multiple of the block size.
    """

    shards: int
    """Number of token shards."""
    slots: int
    """Maximum number of running requests on each token shard."""
    page: int
    """Number of positions in a page."""
    groups: tuple[CacheGroup, ...]
    """Cache groups, one for each attention window."""
    max_chunk_tokens: int
    """Maximum number of prompt tokens of one request in a step."""
    max_prefills: int
    """Maximum number of requests in prefill on each token shard in a step."""
    max_rows: int
    """Maximum number of rows of each token shard in a step.

    Decode rows come first and are never delayed; prompt tokens fill the rest. The first prompt gets at least one token,
    so a step has at most `max(max_rows, slots)` rows.
    """
    decode_steps: int
    """Maximum number of decode steps in one dispatch."""
    prefix_cache: bool
    """Share the cached pages of common prompt prefixes."""
    block: int = 1
    """Number of positions that are decoded and written together; prompt chunks and rows are whole blocks."""

    def __post_init__(self) -> None:
        for name in (
            "shards",
            "slots",
            "page",
            "max_chunk_tokens",
            "max_prefills",
            "max_rows",
            "decode_steps",
            "block",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("max_chunk_tokens", "max_rows"):
            if getattr(self, name) % self.block:
                raise ConfigError(
                    f"{name} must be a multiple of the block size, {self.block}, got {getattr(self, name)}"
                )
        if not self.groups:
            raise ConfigError("groups must have at least one cache group, got none")
        for group in self.groups:
            if group.pages < 1 or (group.window is not None and group.window < 1):
                raise ConfigError(f"a cache group must have at least one page and a window of at least 1, got {group}")

    def whole_blocks(self, positions: int) -> int:
        """Round a number of positions up to whole blocks."""
        return -(-positions // self.block) * self.block
