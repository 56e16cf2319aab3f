"""Runs requests on the mesh, in waves of as many as fit: prefill in chunks, then decode until all have ended.

S  slots of a token shard     T  rows of a token shard in one step     P  positions of a cache
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from moe_jax.batching import Seat, Segment, assign_seats, prefill_steps
from moe_jax.models import Batch, Caches, Parameters, ShardedDecoder, pack
from moe_jax.programs import Programs
from moe_jax.requests import FinishReason, SamplingParams
from moe_jax.sampling import Knobs
from moe_jax.sharding import FINE, Policy, Role, Route, bucket

SMALLEST_CHUNK = 16
"""Prompt tokens that a sequence gets into one step at least, however many sequences there are."""


@dataclass
class Request:
    """A prompt on its way to being continued."""

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    end_ids: frozenset[int]
    most_tokens: int
    """How many tokens may be generated before `max_tokens` or the cache is full."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def append(self, token: int, logprob: float) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.end_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.most_tokens:
            self.finish_reason = "length"


@dataclass
class Throughput:
    """What generation took, compilation not counted."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def decoded_per_second(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Shape:
    """The static sizes of a step, and how its rows go through a layer."""

    slots: int
    chunk: int
    capacity: int
    route: Route


class Engine:
    """A decoder with its weights.

    Args:
      policy: how rows go through a layer.
      prefill_rows: about how many prompt tokens of a token shard go into one step.
    """

    def __init__(
        self, decoder: ShardedDecoder, parameters: Parameters, policy: Policy, *, prefill_rows: int = 512
    ) -> None:
        self.decoder = decoder
        self.programs = Programs(decoder)
        self.throughput = Throughput()
        self._parameters = parameters
        self._policy = policy
        self._prefill_rows = prefill_rows

    def generate(self, requests: Sequence[Request]) -> Iterator[int]:
        """Run requests to their end, together. Yields after each step how many tokens it gave."""
        prompts = [request.prompt for request in requests]
        # The last token generated is not fed back, so it needs no place in the cache.
        positions = max(len(request.prompt) + request.most_tokens - 1 for request in requests)
        seats, slots, caches = self._admit(prompts, positions)

        shape = None
        for segments in prefill_steps(prompts, seats, self._chunk(prompts, slots)):
            shape = shape or self._shape(segments, slots)
            caches, given, seconds = self._next_tokens(segments, shape, caches, requests)
            self.throughput.prompt_tokens += sum(len(segment.tokens) for segment in segments)
            self.throughput.prefill_seconds += seconds
            yield given

        shape = None
        while running := [r for r, request in enumerate(requests) if request.finish_reason is None]:
            segments = [_last_token(r, requests[r], seats[r]) for r in running]
            shape = shape or self._shape(segments, slots)
            caches, given, seconds = self._next_tokens(segments, shape, caches, requests)
            self.throughput.decoded_tokens += given
            self.throughput.decode_seconds += seconds
            yield given

    def logits(self, prompts: Sequence[Sequence[int]]) -> list[Float[np.ndarray, "length vocab"]]:
        """The logits after every token of each prompt, all prompts together."""
        seats, slots, caches = self._admit(prompts, max(map(len, prompts)))
        parts: list[list[np.ndarray]] = [[] for _ in prompts]
        shape = None
        for segments in prefill_steps(prompts, seats, self._chunk(prompts, slots)):
            shape = shape or self._shape(segments, slots)
            batch, first_rows = self._pack(segments, shape)
            logits, caches = self.programs.all_logits(self._parameters, caches, batch, route=shape.route)
            host = np.asarray(logits)
            for segment, first in zip(segments, first_rows, strict=True):
                parts[segment.request].append(host[first : first + len(segment.tokens)])
        return [np.concatenate(rows) for rows in parts]

    def _admit(self, prompts: Sequence[Sequence[int]], positions: int) -> tuple[list[Seat], int, Caches]:
        seats = assign_seats([len(prompt) for prompt in prompts], self._shards)
        slots = bucket(1 + max(seat.slot for seat in seats))
        return seats, slots, self.decoder.empty_caches(slots, bucket(positions))

    def _chunk(self, prompts: Sequence[Sequence[int]], slots: int) -> int:
        return min(bucket(max(map(len, prompts))), max(bucket(self._prefill_rows // slots), SMALLEST_CHUNK))

    def _shape(self, segments: Sequence[Segment], slots: int) -> Shape:
        """The sizes for these segments, which fewer or shorter ones of later steps fit too."""
        counts = [0] * self._shards
        for segment in segments:
            counts[segment.seat.shard] += len(segment.tokens)
        capacity = bucket(max(counts), FINE)
        chunk = bucket(max(len(segment.tokens) for segment in segments))
        return Shape(slots, chunk, capacity, self._policy.decide(counts, capacity).route)

    def _next_tokens(
        self, segments: Sequence[Segment], shape: Shape, caches: Caches, requests: Sequence[Request]
    ) -> tuple[Caches, int, float]:
        """Run a step and give each request its token, if its prompt has ended: how many, and in how many seconds."""
        began = time.perf_counter() - self.programs.compile_seconds
        batch, _ = self._pack(segments, shape)
        knobs = self._knobs(segments, shape, requests)
        sampled, caches = self.programs.next_tokens(self._parameters, caches, batch, knobs, route=shape.route)
        tokens, logprobs = (np.asarray(part).reshape(self._shards, shape.slots) for part in sampled)
        given = 0
        for segment in segments:
            request, at = requests[segment.request], (segment.seat.shard, segment.seat.slot)
            if segment.end >= len(request.prompt):
                request.append(int(tokens[at]), float(logprobs[at]))
                given += 1
        return caches, given, time.perf_counter() - self.programs.compile_seconds - began

    def _pack(self, segments: Sequence[Segment], shape: Shape) -> tuple[Batch, list[int]]:
        batch, first_rows = pack(
            segments, self.decoder.placement, slots=shape.slots, chunk=shape.chunk, capacity=shape.capacity
        )
        assert shape.route.holds(np.asarray(batch.rows.counts).tolist(), shape.capacity), "later steps have fewer rows"
        return batch, first_rows

    def _knobs(self, segments: Sequence[Segment], shape: Shape, requests: Sequence[Request]) -> Knobs | None:
        if all(requests[segment.request].params.temperature == 0 for segment in segments):
            return None
        at_slot = {(s.seat.shard, s.seat.slot): requests[s.request] for s in segments}
        requests_or_none = (at_slot.get((shard, slot)) for shard in range(self._shards) for slot in range(shape.slots))
        idle = (SamplingParams(temperature=0), 0, 0)
        return Knobs.of([(r.params, r.seed, len(r.tokens)) if r else idle for r in requests_or_none])

    @property
    def _shards(self) -> int:
        return self.decoder.placement.size(Role.TOKENS)


def _last_token(number: int, request: Request, seat: Seat) -> Segment:
    return Segment(number, seat, len(request.prompt) + len(request.tokens) - 1, request.tokens[-1:])
