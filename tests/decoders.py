"""Runs a tiny decoder on a placement, chunk after chunk: a dense layer, then an MoE with a shared expert."""

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
FILLED = 16
"""Rows of all shards together: few enough for packing them to pay."""
PAD_TOKEN = 0
"""What `pack` puts into pad rows."""


PROMPTS = [[3, 5, 7, 9, 11, 13], [2, 4, 6], [1], [10, 20, 30, 40, 50, 60, 8, 9]]
"""Two chunks of unlike lengths, the second without two of the sequences."""


class Seat(NamedTuple):
    """Where a sequence is: a line of a token shard, with pages of its own."""

    shard: int
    segment: int


@dataclass(frozen=True)
class Part:
    """Consecutive tokens of one prompt in one step."""

    number: int
    segment: Segment


def parts(prompts: Sequence[Sequence[int]], seats: Sequence[Seat]) -> Iterator[dict[Seat, Part]]:
    """The prompts cut into steps of at most `CHUNK` tokens of each."""
    own = {seat: array("i", range(seat.segment, PAGES, SLOTS)) for seat in seats}  # the pages of the lines alternate
    for start in range(0, max(map(len, prompts)), CHUNK):
        yield {
            seat: Part(number, Segment(start, prompt[start : start + CHUNK], [PageRange(0, own[seat])]))
            for number, (prompt, seat) in enumerate(zip(prompts, seats, strict=True))
            if start < len(prompt)
        }


def token_shards(where: str) -> int:
    return placement(where).size(Role.TOKENS)


def ends(where: str) -> list[Seat]:
    """For two sequences on the first shard and two on the last; those between are idle."""
    last = token_shards(where) - 1
    return [Seat(0, 0), Seat(0, 1), Seat(last, 0), Seat(last, 1)]


@cache
def decoder(where: str) -> ShardedDecoder:
    return ShardedDecoder(MODEL, placement(where), "float32")


@cache
def parameters(where: str) -> nnx.State:
    """Drawn once, on one device, which is quicker."""
    if where == "single":
        return decoder(where).init(0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, decoder(where).parameters)
    return jax.device_put(parameters("single"), shardings)


@cache
def program(where: str, strategy: type[Combine]) -> Wrapped:
    """`(parameters, caches, batch) -> logits of all rows, caches`, for any batch of at most `FILLED` rows."""
    made = decoder(where)
    if strategy is RaggedCombine:
        combine: Combine = RaggedCombine(made.placement, base=2, overflow=CAPACITY * made.placement.gather_shards)
    else:
        combine = strategy.sized(made.placement, [FILLED, *[0] * (token_shards(where) - 1)], CAPACITY)
    return jax.jit(lambda parameters, caches, batch: made.all_logits(parameters, caches, batch, Route.whole(combine)))


def packed(where: str, step: Mapping[Seat, Part]) -> tuple[ForwardBatch, list[int], list[Part]]:
    """The batch, and the parts in the order of their rows, with the first row of each."""
    shards = [[step[seat] for seat in sorted(step) if seat.shard == shard] for shard in range(token_shards(where))]
    shape = BatchShape((QueryLayout(SLOTS, CHUNK),), CAPACITY, ((None, POSITIONS // PAGE),))
    segments = [[Segments.of([part.segment for part in shard], tables=1)] for shard in shards]
    batch, first_rows = pack(segments, shape, placement(where))
    return batch, first_rows, [part for shard in shards for part in shard]


def arguments(where: str, step: Mapping[Seat, Part]) -> tuple[nnx.State, Caches, ForwardBatch]:
    """Of `program`, for a first step."""
    return parameters(where), decoder(where).empty_caches({None: PAGES}, PAGE, SLOTS), packed(where, step)[0]


def run(
    where: str,
    strategy: type[Combine],
    prompts: Sequence[Sequence[int]],
    seats: Sequence[Seat],
    with_parameters: nnx.State | None = None,
) -> tuple[list[np.ndarray], Caches]:
    """The logits after each token of each prompt, taken in chunks, and the caches in the end."""
    weights, caches, _ = arguments(where, {})
    found: list[list[np.ndarray]] = [[] for _ in prompts]
    for step in parts(prompts, seats):
        batch, first_rows, order = packed(where, step)
        logits, caches = program(where, strategy)(with_parameters or weights, caches, batch)
        for part, first in zip(order, first_rows, strict=True):
            found[part.number].append(np.asarray(logits)[first : first + len(part.segment.tokens)])
    return [np.concatenate(rows) for rows in found], caches


@cache
def alone(prompt: tuple[int, ...]) -> np.ndarray:
    """The logits of a prompt that has one device to itself."""
    (logits,), _ = run("single", ReduceCombine, [prompt], [Seat(0, 0)])
    return logits


def assert_as_alone(
    where: str, strategy: type[Combine], prompts: Sequence[Sequence[int]], seats: Sequence[Seat]
) -> None:
    """Log-probabilities are those of each prompt alone, to a ten-thousandth of a nat."""
    logits, _ = run(where, strategy, prompts, seats)
    for got, prompt in zip(logits, prompts, strict=True):
        expected = log_softmax(alone(tuple(prompt)), axis=-1)
        np.testing.assert_allclose(log_softmax(got, axis=-1), expected, rtol=0, atol=1e-4)
