"""Whole sequences as training examples."""

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

NOT_A_TARGET = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """A batch of sequences, each whole in one step, and the token that follows each row."""

    batch: ForwardBatch
    targets: Int32[Array, "shards*T"]
    """`NOT_A_TARGET` where nothing is to be learned."""


def examples(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], placement: Placement, longest: int
) -> Examples:
    """Sequences of a prompt, which is given, and an answer, which is learned; none longer than `longest` tokens."""
    inputs = [(prompt + answer)[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    shards = spread([len(tokens) for tokens in inputs], placement.size(Role.TOKENS))
    segments = max(map(len, shards))
    shape = BatchShape((QueryLayout(segments, longest),), segments * longest)
    segments = ([Segment(0, inputs[number]) for number in of_shard] for of_shard in shards)
    batch, first_rows = pack([[Segments.of(each)] for each in segments], shape, placement)
    targets = np.full(batch.tokens.shape, NOT_A_TARGET, np.int32)
    for first, number in zip(first_rows, chain(*shards), strict=True):
        prompt, answer = prompts[number], answers[number]
        targets[first + len(prompt) - 1 :][: len(answer)] = answer
    return Examples(batch, on_host(targets))


def spread(lengths: Sequence[int], shards: int) -> list[list[int]]:
    """Which sequences each shard takes: as many on every shard (give or take one), and tokens as even as greedy makes
    them.

    The longest choose first; each goes to the shard with the fewest sequences, then the fewest tokens.
    """
    loads: list[tuple[int, int, int]] = [(0, 0, shard) for shard in range(shards)]
    taken: list[list[int]] = [[] for _ in range(shards)]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        count, tokens, shard = heapq.heappop(loads)
        taken[shard].append(number)
        heapq.heappush(loads, (count + 1, tokens + lengths[number], shard))
    return taken
