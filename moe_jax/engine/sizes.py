"""The few shapes of steps that are compiled.

Each dimension is rounded up to one of a few buckets, so that few programs are compiled. A step has at most twice the
prompt rows that it needs, and at most four times the pages, or 512 where attention loops over the pages in use. A step
without prompts has at most four times the segments that it needs; a step with prompts has segments for all slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.models import BatchShape
from moe_jax.programs import PAGE
from moe_jax.scheduler import CacheGroup

MIN_PROMPT_ROWS = 32
"""Smallest bucket of prompt rows."""
MIN_PAGES, MIN_PAGES_OF_LOOP = 8, 512
"""Smallest bucket of pages: where attention reads the pages that a step has room for, and where attention loops over
the pages in use, so that room costs only a longer page table."""
MIN_SEGMENT_ROWS, MAX_SEGMENT_ROWS = 8, 64
"""Bounds of the rows of a prompt segment. Attention scores all rows of a segment against all pages of the segment."""


@dataclass(frozen=True)
class StepSize:
    """Shape of one step on each token shard."""

    windows: tuple[int | None, ...]
    """Attention windows of the layers; each has its own page table."""
    decoding: int
    """Segments of requests that decode."""
    prompts: int
    """Maximum prompts in the step."""
    prompt_rows: int
    """Rows of prompts."""
    pages: int
    """Pages of the longest sequence."""
    block: int = 1
    """Rows of the segment of a decoding request."""
    decode_steps: int = 1
    """Maximum decode steps of the dispatch. The page table of a segment serves all of them."""

    @property
    def chunk(self) -> int:
        """Rows of a prompt segment, in whole blocks.

        Each prompt has at most one partly filled segment. The rows are few enough that full segments are about as
        numerous.
        """
        rows = min(max(self.prompt_rows // self.prompts, MIN_SEGMENT_ROWS), MAX_SEGMENT_ROWS, self.prompt_rows)
        return -(-rows // self.block) * self.block

    @property
    def prompt_segments(self) -> int:
        """Segments for all prompt rows, with one partly filled segment for each prompt."""
        return self.prompt_rows // self.chunk + self.prompts if self.prompt_rows else 0

    @property
    def segments(self) -> int:
        return self.decoding + self.prompt_segments

    def covers(self, other: StepSize) -> bool:
        """Return True if each step that fits `other` fits this size too. Only steps with prompts have prompt rows."""
        return (
            (self.prompt_rows > 0) == (other.prompt_rows > 0)
            and self.prompt_rows >= other.prompt_rows
            and self.decoding >= other.decoding
            and self.pages >= other.pages
        )

    @cached_property
    def shape(self) -> BatchShape:
        layouts = (QueryLayout(self.decoding, self.block), QueryLayout(self.prompt_segments, self.chunk))
        rows = max(MAX_SEGMENT_ROWS, self.chunk, self.decode_steps)
        tables = tuple((window, max_pages(window, self.pages * PAGE, rows)) for window in self.windows)
        return BatchShape(
            tuple(layout for layout in layouts if layout.segments),
            self.decoding * self.block + self.prompt_rows,
            tables,
        )


@dataclass(frozen=True)
class Sizes:
    """Capacity of each token shard, and the step shapes that follow from it."""

    windows: tuple[int | None, ...]
    """Attention windows of the layers."""
    slots: int
    """Maximum running requests."""
    positions: int
    """Maximum positions of a sequence."""
    prompt_rows: int
    """Maximum prompt rows in one step."""
    prompts: int
    """Maximum prompts in one step."""
    decode_steps: int
    """Maximum decode steps in one dispatch."""
    block: int = 1
    """Positions that are decoded together; `positions` and `prompt_rows` are multiples of it."""
    min_pages: int = MIN_PAGES
    """Smallest bucket of pages."""

    def step(self, decoding: int, prompt_rows: int, positions: int) -> StepSize:
        """Return the smallest step that fits.

        Args:
          decoding: requests that decode.
          prompt_rows: rows of prompts.
          positions: positions of the longest sequence.
        """
        rows = _smallest_fit(self._prompt_rows, prompt_rows) if prompt_rows else 0
        segments = self.slots if rows else _smallest_fit(_buckets(self.slots), decoding)
        return self._step_size(segments, rows, _smallest_fit(self._pages, -(-positions // PAGE)))

    def steps(self) -> Iterator[StepSize]:
        """Yield every size that `step` can return."""
        for segments, pages in product(_buckets(self.slots), self._pages):
            yield self._step_size(segments, 0, pages)
        for rows, pages in product(self._prompt_rows, self._pages):
            yield self._step_size(self.slots, rows, pages)

    def needed_pages(self, window: int | None) -> int:
        """Return the largest number of pages in use at once, for the layers of one window."""
        of_one = max_pages(window, self.positions, max(MAX_SEGMENT_ROWS, self.decode_steps))
        prefilling = self.prompts * -(-self.prompt_rows // PAGE)
        return min(self.slots * -(-self.positions // PAGE), self.slots * of_one + prefilling)

    @property
    def _prompt_rows(self) -> list[int]:
        return _buckets(self.prompt_rows, MIN_PROMPT_ROWS, factor=2)

    @property
    def _pages(self) -> list[int]:
        return _buckets(-(-self.positions // PAGE), self.min_pages)

    def _step_size(self, segments: int, rows: int, pages: int) -> StepSize:
        return StepSize(self.windows, segments, self.prompts, rows, pages, self.block, 1 if rows else self.decode_steps)


def max_pages(window: int | None, positions: int, rows: int) -> int:
    """Return the largest number of pages that neighbouring rows of a sequence attend to.

    Args:
      window: attention window; None for full attention.
      positions: positions of the sequence.
      rows: number of these rows, over all steps of a dispatch.
    """
    return CacheGroup(1, window).max_pages(positions, rows, PAGE)


def _buckets(largest: int, smallest: int = 1, factor: int = 4) -> list[int]:
    """Divide `largest` by `factor` again and again, down to the first value of at most `smallest`."""
    sizes = [largest]
    while sizes[-1] > smallest:
        sizes.append(-(-sizes[-1] // factor))
    return sizes


def _smallest_fit(buckets: Sequence[int], needed: int) -> int:
    return min(size for size in buckets if size >= needed)
