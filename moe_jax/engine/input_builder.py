"""Turn a plan of the scheduler into the input of a dispatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, repeat
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.engine.generation import Generation
from moe_jax.engine.sizes import Sizes, StepSize
from moe_jax.models import PageRange, Segment, Segments, pack
from moe_jax.programs import FROM_BUFFER, PAGE, StepFlags, StepInput
from moe_jax.programs.sampling import SamplingMetadata
from moe_jax.programs.step_input import Columns
from moe_jax.scheduler import Chunk, Decodes, Plan, Request, RequestPages
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.rows import on_host

NO_REQUEST = SamplingMetadata.of([None])


class SampledSegment(NamedTuple):
    """Segment that emits tokens of a request."""

    request: Request
    segment: int
    """Index of the segment, over all token shards."""


class PromptRows(NamedTuple):
    """Neighbouring rows of a prompt whose logits or log-probabilities are wanted."""

    request: Request
    start: int
    """Position of the first row."""
    rows: slice
    """Indices of the rows, over all token shards."""


@dataclass(frozen=True)
class OutputMap:
    """Requests to which the outputs of a dispatch belong."""

    samples: list[SampledSegment] = field(default_factory=list)
    """Segments that emit tokens."""
    prompts: list[PromptRows] = field(default_factory=list)
    """Rows whose logits or log-probabilities are wanted."""


def build_input(
    plan: Plan,
    size: StepSize,
    sizes: Sizes,
    placement: Placement,
    flags: StepFlags,
    generation: Callable[[Request], Generation],
    builder: Callable[..., StepInputBuilder],
) -> tuple[StepInput, OutputMap]:
    """Build the input of a plan in a step of the given size, and the map from its outputs to requests."""
    built = builder(size, sizes, len(plan.decodes), generation)
    for decodes, chunks in zip(plan.decodes, plan.chunks, strict=True):
        built.add_shard(decodes, chunks)
    return built.build(placement, flags), built.output_map


def idle_input(
    size: StepSize, sizes: Sizes, placement: Placement, flags: StepFlags, builder: Callable[..., StepInputBuilder]
) -> StepInput:
    """Build the input of a step without requests, to compile the program of the step."""
    shards = placement.size(Role.TOKENS)
    built = builder(size, sizes, shards, lambda request: {}[request])
    for _ in range(shards):
        built.add_shard(Decodes(), [])
    return built.build(placement, flags)


def smallest_size(plan: Plan, sizes: Sizes) -> StepSize:
    """Return the smallest size of step that fits a plan."""
    prompt_rows = max(sum(chunk.end - chunk.start for chunk in chunks) for chunks in plan.chunks)
    decoded = (position + steps for _, position, steps in chain(*plan.decodes))
    computed = (chunk.end for chunk in chain(*plan.chunks))
    return sizes.step(max(map(len, plan.decodes)), prompt_rows, max(chain(decoded, computed)))


class StepInputBuilder:
    """Fill the arrays of a dispatch, token shard after token shard."""

    def __init__(self, size: StepSize, sizes: Sizes, shards: int, generation: Callable[[Request], Generation]) -> None:
        """
        Args:
          size: shape of the step.
          shards: number of token shards.
          generation: returns the generation of a request.
        """
        self.output_map = OutputMap()
        self._size, self._sizes, self._generation = size, sizes, generation
        self._slots = np.full((shards, size.segments), sizes.slots, np.int32)
        self._samples = np.zeros((shards, size.segments), bool)
        self._limits = np.zeros((shards, self._emitting_segments), np.int32)
        self._sampling = [[NO_REQUEST] * size.prompt_segments for _ in range(shards)]
        self._targets = np.zeros((shards, size.shape.capacity), np.int32)
        self._segments: list[list[Segments]] = []

    def add_shard(self, decodes: Decodes, chunks: Sequence[Chunk]) -> None:
        """Add the segments of the next token shard."""
        shard = len(self._segments)
        decoding, prompts = self._add_decodes(shard, decodes), Segments(len(self._size.windows))
        row = len(decodes) * decodes.width
        for chunk in chunks:
            for start in range(chunk.start, chunk.end, self._size.chunk):
                end = min(start + self._size.chunk, chunk.end)
                prompts.add(self._prompt(shard, len(prompts), row, chunk, start, end))
                row += end - start
        parts = ((self._size.decoding, decoding), (self._size.prompt_segments, prompts))
        self._segments.append([segments for places, segments in parts if places])

    def build(self, placement: Placement, flags: StepFlags) -> StepInput:
        """Build a single step if there are prompts, else a loop of decode steps."""
        is_loop = not self._size.prompt_segments
        return StepInput(
            pack(self._segments, self._size.shape, placement)[0],
            slots=on_host(self._slots.reshape(-1)),
            samples=on_host(self._samples.reshape(-1)),
            sampling=joined(self._sampling),
            targets=on_host(self._targets.reshape(-1)) if self.output_map.prompts else None,
            limits=on_host(self._limits.reshape(-1)) if is_loop else None,
            flags=replace(flags, logits=False) if is_loop else flags,
            max_steps=self._sizes.decode_steps if is_loop else 1,
        )

    @property
    def _emitting_segments(self) -> int:
        """Segments of a token shard that have a row in the outputs."""
        return self._size.segments

    def _add_decodes(self, shard: int, decodes: Decodes) -> Segments:
        decoding = slice(len(decodes))
        self._slots[shard, decoding] = [request.slot for request in decodes.requests]
        self._mark_decoding(shard, decoding, decodes)
        first = shard * self._emitting_segments
        self.output_map.samples.extend(map(SampledSegment, decodes.requests, count(first)))
        segments = Segments(len(self._size.windows))
        segments.starts.extend(decodes.positions)
        segments.lengths.extend(repeat(decodes.width, len(decodes)))
        segments.tokens.extend(repeat(FROM_BUFFER, len(decodes) * decodes.width))
        for number, ranges in enumerate(segments.tables):
            ranges += [_visible_pages(request.pages[number], start, start + steps) for request, start, steps in decodes]
        return segments

    def _mark_decoding(self, shard: int, decoding: slice, decodes: Decodes) -> None:
        """Set which decoding segments emit tokens, and how many."""
        self._samples[shard, decoding], self._limits[shard, decoding] = True, decodes.steps

    def _prompt(self, shard: int, number: int, row: int, chunk: Chunk, start: int, end: int) -> Segment:
        """Make the prompt segment of this number, for positions `start` to `end` of a request; it begins at `row`."""
        request, segment = chunk.request, self._size.decoding + number
        generation = self._generation(request)
        self._slots[shard, segment] = request.slot
        self._sampling[shard][number] = generation.sampling
        if chunk.samples and end == chunk.end:
            self._end_prompt(shard, segment, request)
        if generation.needs_prompt_rows:
            first = shard * self._size.shape.capacity + row
            self.output_map.prompts.append(PromptRows(request, start, slice(first, first + end - start)))
            following = request.sequence(start + 1, end + 1)
            self._targets[shard, row : row + len(following)] = following
        return Segment(
            start, request.sequence(start, end), [_visible_pages(table, start, end) for table in request.pages]
        )

    def _end_prompt(self, shard: int, segment: int, request: Request) -> None:
        """Sample a token after the last row of a prompt."""
        self._samples[shard, segment] = True
        self.output_map.samples.append(SampledSegment(request, shard * self._size.segments + segment))


def joined(shards: Sequence[Sequence[Columns]]) -> Columns | None:
    """Concatenate the named arrays of all token shards; None if there are none."""
    parts = list(chain(*shards))
    return jax.tree.map(lambda *rows: on_host(np.concatenate(rows)), *parts) if parts else None


def _visible_pages(table: RequestPages, start: int, end: int) -> PageRange:
    """Select the pages that the positions from `start` up to `end` attend to."""
    first = table.pool.group.first_page(start, PAGE)
    return PageRange(first * PAGE, table.ids[first - table.first : -(-end // PAGE) - table.first])
