"""Prompt chunks of one token shard in one step: how prompts share the rows that decoding leaves."""

from __future__ import annotations

from collections.abc import Sequence

from moe_jax.scheduler.plan import Chunk
from moe_jax.scheduler.prefix_tree import PrefixNode
from moe_jax.scheduler.request import Request
from moe_jax.scheduler.shard import TokenShard

LONGER = 4
"""A prompt need not wait for an earlier one that has at least `LONGER` times its tokens left."""


class PrefillBatch:
    """Prompt chunks of one token shard in one step.

    Prompts take rows in queue order. A prompt that fits into the rows that are left takes the rows that it needs. A
    longer one is capped: it takes half of them, and leaves the rest to prompts that are at most a `LONGER`th as long.
    Rows that these do not need go back to the capped prompts. A long prompt thus delays short ones by few steps, and
    short ones make its prefill at most twice as long. vLLM bounds long prompts by `long_prefill_token_threshold` and
    `max_long_partial_prefills`.
    """

    def __init__(self, shard: TokenShard, rows: int) -> None:
        self.shard = shard
        self.rows = rows
        """Number of rows that are left."""
        self._chunks: list[Chunk] = []
        self._capped: list[tuple[int, int]] = []
        """Chunk index of each capped prompt, with the number of its tokens that the step began with."""

    @property
    def has_room(self) -> bool:
        """True if another request can begin in this step."""
        return self.shard.has_free_slot and self._has_rows

    def continue_prompts(self) -> None:
        """Plan the next chunks of the requests in prefill."""
        for request in self.shard.prefilling:  # preemption removes requests at the end of the list
            if not self._has_rows:
                break
            if self.must_wait(request, request.known - request.computed):
                continue
            tokens, is_capped = self._share(request)
            end = request.computed + tokens
            if end > request.allocated and not self.shard.extend(request, end):
                break
            self._add(request, end, is_capped)

    def must_wait(self, request: Request, tokens: int) -> bool:
        """Return True if a request waits for an earlier prompt, which can use all rows of the step.

        Args:
          request: the request.
          tokens: number of tokens that its prefill still computes.
        """
        return any(
            self._chunks[index].request.order < request.order and tokens * LONGER > left for index, left in self._capped
        )

    def admit(self, request: Request, prefix: Sequence[PrefixNode]) -> None:
        """Start a request that has room, with its first chunk."""
        self.shard.start(request, prefix)
        tokens, is_capped = self._share(request)
        self._add(request, request.computed + tokens, is_capped)

    def finish(self) -> list[Chunk]:
        """Give the rows that are left to capped prompts, shorter ones first, and return the chunks of the step."""
        for index, _ in reversed(self._capped):
            if self.rows:
                self._grow(index)
        self.shard.prefilling = [request for request in self.shard.prefilling if request.computed < request.known]
        return self._chunks

    @property
    def _has_rows(self) -> bool:
        return self.rows > 0 and len(self._chunks) < self.shard.limits.max_prefills

    def _share(self, request: Request) -> tuple[int, bool]:
        """Number of tokens in the next chunk of a request, and True if the chunk is capped."""
        left, most = request.known - request.computed, self._most(self.rows)
        if left <= most:
            return left, False
        block = self.shard.limits.block
        share = min(most, self.rows - self.rows // 2 // block * block)
        return share, share < most

    def _most(self, rows: int) -> int:
        """Largest number of tokens of a chunk in `rows` rows."""
        return min(rows, self.shard.limits.max_chunk_tokens)

    def _add(self, request: Request, end: int, is_capped: bool) -> None:
        if is_capped:
            self._capped.append((len(self._chunks), request.known - request.computed))
        self._chunks.append(self.shard.chunk(request, end))
        self.rows -= self.shard.rows(self._chunks[-1])

    def _grow(self, index: int) -> None:
        """Extend a chunk over the rows that are left, if pages are available without preemption."""
        chunk, shard = self._chunks[index], self.shard
        request, rows = chunk.request, self.rows + shard.rows(chunk)
        request.computed = chunk.start  # the step still reads the pages that the window passes within the chunk
        end = min(chunk.start + self._most(rows), request.known)
        if end > request.allocated and not shard.pages.extend(request, end):
            end = chunk.end
        self._chunks[index] = shard.chunk(request, end)
        self.rows = rows - shard.rows(self._chunks[index])
