"""The few sizes of steps that are compiled.

Each size comes from a ladder, so that there are few programs to compile, and a step has at most four times the lines or
pages that it needs, and twice the prompt rows, of which there are most; beside those there are lines for all slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.models import BatchShape
from moe_jax.programs import PAGE

SMALLEST_PROMPT_ROWS, SMALLEST_TABLE = 32, 8
SMALLEST_LINE, LARGEST_LINE = 8, 64
"""Rows of a prompt that attention takes together: each of them is scored against all pages of the line."""


@dataclass(frozen=True)
class StepSize:
    """Of one step, on each token shard."""

    windows: tuple[int | None, ...]
    """How far back layers look: each distance has its own table of pages."""
    decoding: int
    """Lines of requests that decode."""
    prompts: int
    """Prompts that take part, at most."""
    prompt_rows: int
    pages: int
    """Of the longest sequence."""
    block: int = 1
    """Rows of a line of a request that decodes."""

    @property
    def chunk(self) -> int:
        """Rows of a line of a prompt: as few as let broken lines be no more than whole ones, in whole blocks."""
        rows = min(max(self.prompt_rows // self.prompts, SMALLEST_LINE), LARGEST_LINE, self.prompt_rows)
        return -(-rows // self.block) * self.block

    @property
    def prompt_segments(self) -> int:
        """Enough for all rows, with a broken line for each prompt."""
        return self.prompt_rows // self.chunk + self.prompts if self.prompt_rows else 0

    @property
    def segments(self) -> int:
        return self.decoding + self.prompt_segments

    @cached_property
    def shape(self) -> BatchShape:
        layouts = (QueryLayout(self.decoding, self.block), QueryLayout(self.prompt_segments, self.chunk))
        tables = tuple((window, min(self.pages, max_pages(window))) for window in self.windows)
        return BatchShape(
            tuple(layout for layout in layouts if layout.segments),
            self.decoding * self.block + self.prompt_rows,
            tables,
        )


@dataclass(frozen=True)
class Sizes:
    """What there is room for on each token shard."""

    windows: tuple[int | None, ...]
    slots: int
    """Requests that run at once."""
    positions: int
    """Of a sequence."""
    prompt_rows: int
    """The most rows of prompts in one step."""
    prompts: int
    """The most prompts in one step."""
    decode_steps: int
    """The most decode steps of one dispatch."""
    block: int = 1
    """Positions that are decoded together; `positions` and `prompt_rows` are whole blocks."""

    def step(self, decoding: int, prompt_rows: int, positions: int) -> StepSize:
        """The smallest for so many decoding requests, so many rows of prompts, and sequences of so many positions."""
        rows = _fitting(self._prompt_rows, prompt_rows) if prompt_rows else 0
        segments = self.slots if rows else _fitting(_ladder(self.slots), decoding)
        return self._sized(segments, rows, _fitting(self._pages, -(-positions // PAGE)))

    def steps(self) -> Iterator[StepSize]:
        """All that `step` gives."""
        for segments, pages in product(_ladder(self.slots), self._pages):
            yield self._sized(segments, 0, pages)
        for rows, pages in product(self._prompt_rows, self._pages):
            yield self._sized(self.slots, rows, pages)

    def needed_pages(self, window: int | None) -> int:
        """The most pages that can be in use at once, in one group of layers."""
        everything = -(-self.positions // PAGE)
        passing = self.prompts * -(-self.prompt_rows // PAGE)
        return min(self.slots * everything, self.slots * max_pages(window) + passing)

    @property
    def _prompt_rows(self) -> list[int]:
        return _ladder(self.prompt_rows, SMALLEST_PROMPT_ROWS, factor=2)

    @property
    def _pages(self) -> list[int]:
        return _ladder(-(-self.positions // PAGE), SMALLEST_TABLE)

    def _sized(self, segments: int, rows: int, pages: int) -> StepSize:
        return StepSize(self.windows, segments, self.prompts, rows, pages, self.block)


def max_pages(window: int | None) -> int:
    """Those that the rows of one line can see."""
    return 2**30 if window is None else -(-(window + LARGEST_LINE) // PAGE) + 1


def _ladder(largest: int, least: int = 1, factor: int = 4) -> list[int]:
    """From `largest` down to the first that is at most `least`."""
    sizes = [largest]
    while sizes[-1] > least:
        sizes.append(-(-sizes[-1] // factor))
    return sizes


def _fitting(ladder: Sequence[int], needed: int) -> int:
    """The smallest size that holds what is needed."""
    return min(size for size in ladder if size >= needed)
