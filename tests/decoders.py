"""Tiny decoder that tests run on a placement, chunk by chunk: a dense layer, then an MoE layer with a shared expert."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.stages import Wrapped
from placements import placement
from scipy.special import log_softmax

from moe_jax.config import (
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.models import BatchShape, Caches, PageRange, Segment, Segments, ShardedDecoder, pack
from moe_jax.sharding import Combine, RaggedCombine, ReduceCombine, Role, Route

ATTENTION = AttentionConfig(heads=8, kv_heads=2, head_dim=4, rope=RopeConfig(1e4))
MOE = MoEConfig(experts=8, top_k=2, width=16, router=RouterConfig(norm=1), shared=SharedExpertConfig(16, gated=True))
LAYERS = (LayerConfig(ATTENTION, DenseConfig(16)), LayerConfig(ATTENTION, MOE))
MODEL = ModelConfig(vocab_size=64, hidden=16, layers=LAYERS, norm_eps=1e-6, max_positions=16)
SLOTS, CHUNK, CAPACITY, POSITIONS = 2, 4, 10, 8
PAGE = 2
PAGES = SLOTS * POSITIONS // PAGE
MAX_ROWS = 16
"""Upper bound on the rows of all shards together, small enough that packing them pays off."""
PAD_TOKEN = 0
"""Token id that `pack` writes into pad rows."""
PROMPTS = [[3, 5, 7, 9, 11, 13], [2, 4, 6], [1], [10, 20, 30, 40, 50, 60, 8, 9]]
"""Prompts of one or two chunks, of different lengths."""


class Seat(NamedTuple):
    """Token shard and segment of a sequence."""

    shard: int
    segment: int


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive tokens of one prompt in one step."""

    prompt: int
    """Index of the prompt."""
    segment: Segment


def prompt_chunks(prompts: Sequence[Sequence[int]], seats: Sequence[Seat]) -> Iterator[dict[Seat, PromptChunk]]:
    """Cut prompts into steps of at most `CHUNK` tokens of each prompt."""
    pages = {seat: array("i", range(seat.segment, PAGES, SLOTS)) for seat in seats}  # of alternating segments
    for start in range(0, max(map(len, prompts)), CHUNK):
        yield {
            seat: PromptChunk(number, Segment(start, prompt[start : start + CHUNK], [PageRange(0, pages[seat])]))
            for number, (prompt, seat) in enumerate(zip(prompts, seats, strict=True))
            if start < len(prompt)
        }


def token_shards(placement_name: str) -> int:
    return placement(placement_name).size(Role.TOKENS)


def seats_on_outer_shards(placement_name: str) -> list[Seat]:
    """Seats of two sequences on the first token shard and two on the last. The shards between are idle."""
    last = token_shards(placement_name) - 1
    return [Seat(0, 0), Seat(0, 1), Seat(last, 0), Seat(last, 1)]


@cache
def decoder(placement_name: str) -> ShardedDecoder:
    return ShardedDecoder(MODEL, placement(placement_name), "float32")


@cache
def parameters(placement_name: str) -> nnx.State:
    """Random parameters, made on one device, which is quicker, and copied to the placement."""
    if placement_name == "single":
        return decoder(placement_name).init(0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, decoder(placement_name).parameters)
    return jax.device_put(parameters("single"), shardings)


@cache
def program(placement_name: str, strategy: type[Combine]) -> Wrapped:
    """Jitted `(parameters, caches, batch) -> logits of all rows, caches` for batches of at most `MAX_ROWS` rows."""
    sharded = decoder(placement_name)
    if strategy is RaggedCombine:
        overflow = CAPACITY * sharded.placement.gather_shards
        combine: Combine = RaggedCombine(sharded.placement, base=2, overflow=overflow)
    else:
        counts = [MAX_ROWS, *[0] * (token_shards(placement_name) - 1)]
        combine = strategy.sized(sharded.placement, counts, CAPACITY)
    route = Route.whole(combine)
    return jax.jit(lambda parameters, caches, batch: sharded.all_logits(parameters, caches, batch, route))


def pack_step(
    placement_name: str, step: Mapping[Seat, PromptChunk]
) -> tuple[ForwardBatch, list[int], list[PromptChunk]]:
    """Return the batch of a step, the first row of each chunk, and the chunks in the order of their rows."""
    shards = [
        [step[seat] for seat in sorted(step) if seat.shard == shard] for shard in range(token_shards(placement_name))
    ]
    shape = BatchShape((QueryLayout(SLOTS, CHUNK),), CAPACITY, ((None, POSITIONS // PAGE),))
    segments = [[Segments.of([chunk.segment for chunk in shard], tables=1)] for shard in shards]
    batch, first_rows = pack(segments, shape, placement(placement_name))
    return batch, first_rows, [chunk for shard in shards for chunk in shard]


def arguments(placement_name: str, step: Mapping[Seat, PromptChunk]) -> tuple[nnx.State, Caches, ForwardBatch]:
    """Arguments of `program` for a first step."""
    caches = decoder(placement_name).empty_caches({None: PAGES}, PAGE, SLOTS)
    return parameters(placement_name), caches, pack_step(placement_name, step)[0]


def run(
    placement_name: str,
    strategy: type[Combine],
    prompts: Sequence[Sequence[int]],
    seats: Sequence[Seat],
    with_parameters: nnx.State | None = None,
) -> tuple[list[np.ndarray], Caches]:
    """Run prompts chunk by chunk. Return the logits after each token of each prompt, and the final caches."""
    weights, caches, _ = arguments(placement_name, {})
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for step in prompt_chunks(prompts, seats):
        batch, first_rows, chunks = pack_step(placement_name, step)
        logits, caches = program(placement_name, strategy)(with_parameters or weights, caches, batch)
        for chunk, first in zip(chunks, first_rows, strict=True):
            found[chunk.prompt].append(np.asarray(logits)[first : first + len(chunk.segment.tokens)])
    return [np.concatenate(rows) for rows in found], caches


@cache
def single_device_logits(prompt: tuple[int, ...]) -> np.ndarray:
    """Logits of a prompt that runs alone, on one device."""
    (logits,), _ = run("single", ReduceCombine, [prompt], [Seat(0, 0)])
    return logits


def assert_equals_single_device(
    placement_name: str, strategy: type[Combine], prompts: Sequence[Sequence[int]], seats: Sequence[Seat]
) -> None:
    """Compare log-probabilities with those of each prompt alone, to a ten-thousandth of a nat."""
    logits, _ = run(placement_name, strategy, prompts, seats)
    for got, prompt in zip(logits, prompts, strict=True):
        expected = log_softmax(single_device_logits(tuple(prompt)), axis=-1)
        np.testing.assert_allclose(log_softmax(got, axis=-1), expected, rtol=0, atol=1e-4)
