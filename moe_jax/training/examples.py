"""Training batches of whole sequences."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.kernels.forward_batch import ForwardBatch, QueryLayout
from moe_jax.models import BatchShape, Segment, Segments, pack
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.rows import on_host

IGNORE_INDEX = -1
"""Target of rows that have no loss."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """A batch of whole sequences, and the target of each row: the token that follows."""

    batch: ForwardBatch
    targets: Int32[Array, "shards*T"]
    """Target of each row of each token shard; `IGNORE_INDEX` for rows without loss."""


def make_examples(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], placement: Placement, max_length: int
) -> Examples:
    """Pack sequences of a prompt and an answer of up to `max_length` tokens together; only the answer has a loss."""
    inputs = [(prompt + answer)[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    shards = assign_to_shards([len(tokens) for tokens in inputs], placement.size(Role.TOKENS))
    segments = max(map(len, shards))
    shape = BatchShape((QueryLayout(segments, max_length),), segments * max_length)
    shard_segments = ([Segment(0, inputs[index]) for index in shard] for shard in shards)
    batch, first_rows = pack([[Segments.of(each)] for each in shard_segments], shape, placement)
    targets = np.full(batch.tokens.shape, IGNORE_INDEX, np.int32)
    for first, index in zip(first_rows, chain(*shards), strict=True):
        prompt, answer = prompts[index], answers[index]
        targets[first + len(prompt) - 1 :][: len(answer)] = answer
    return Examples(batch, on_host(targets))


def assign_to_shards(lengths: Sequence[int], shards: int) -> list[list[int]]:
    """Indices of the sequences of each shard; numbers of sequences differ by one at most.

    Greedy balancing: sequences are assigned from the longest to the shortest, each to the shard with the fewest
    sequences, among equals to the one with the fewest tokens.
    """
    loads: list[tuple[int, int, int]] = [(0, 0, shard) for shard in range(shards)]
    assigned: list[list[int]] = [[] for _ in range(shards)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        count, tokens, shard = heapq.heappop(loads)
        assigned[shard].append(index)
        heapq.heappush(loads, (count + 1, tokens + lengths[index], shard))
    return assigned
