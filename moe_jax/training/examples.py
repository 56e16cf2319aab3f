"""Whole sequences as training examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.batching import Segment, assign_seats
from moe_jax.models import Batch, pack
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.rows import on_host

NOT_A_TARGET = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """A batch of sequences, each whole in one step, and the token that follows each row."""

    batch: Batch
    targets: Int32[Array, "shards*T"]
    """`NOT_A_TARGET` where nothing is to be learned."""


def examples(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], placement: Placement, longest: int
) -> Examples:
    """Sequences of a prompt, which is given, and an answer, which is learned; none longer than `longest` tokens."""
    shards = placement.size(Role.TOKENS)
    inputs = [(prompt + answer)[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    seats = assign_seats([len(tokens) for tokens in inputs], shards)
    slots = 1 + max(seat.slot for seat in seats)
    segments = [Segment(i, seat, 0, tokens) for i, (seat, tokens) in enumerate(zip(seats, inputs, strict=True))]
    capacity = slots * longest
    batch, first_rows = pack(segments, placement, slots=slots, chunk=longest, capacity=capacity)
    targets = np.full(batch.tokens.shape, NOT_A_TARGET, np.int32)
    for first, prompt, answer in zip(first_rows, prompts, answers, strict=True):
        targets[first + len(prompt) - 1 :][: len(answer)] = answer
    return Examples(batch, on_host(targets))
