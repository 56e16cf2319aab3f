"""The input of one forward pass, packed from the tokens that each sequence takes part with.

T  rows of a token shard     S  slots of a token shard
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int32

from moe_jax.batching import Segment
from moe_jax.layers import Packing
from moe_jax.sharding import Placement, Role, Rows
from moe_jax.sharding.rows import on_host


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """All token shards' rows, shard after shard on the leading dimension. T is the capacity of `rows`."""

    tokens: Int32[Array, "shards*T"]
    packing: Packing
    rows: Rows


def pack(
    segments: Sequence[Segment], placement: Placement, *, slots: int, chunk: int, capacity: int
) -> tuple[Batch, list[int]]:
    """The arrays of a step, and the row, over all shards, at which each segment begins.

    Args:
      slots: S.
      chunk: at least the length of the longest segment.
      capacity: T.
    """
    shards = placement.size(Role.TOKENS)
    tokens, positions = np.zeros((2, shards, capacity), np.int32)
    row_slots = np.full((shards, capacity), slots, np.int32)
    starts, lengths = np.zeros((2, shards, slots), np.int32)
    counts, first_rows = [0] * shards, []
    for segment in segments:
        shard, slot, length = segment.seat.shard, segment.seat.slot, len(segment.tokens)
        first = counts[shard]
        rows = slice(first, first + length)
        tokens[shard, rows], row_slots[shard, rows] = segment.tokens, slot
        positions[shard, rows] = range(segment.start, segment.end)
        starts[shard, slot], lengths[shard, slot] = first, length
        first_rows.append(shard * capacity + first)
        counts[shard] += length
    flat = [on_host(array.reshape(-1)) for array in (tokens, row_slots, positions, starts, lengths)]
    rows = Rows.of(counts, placement, capacity)
    return Batch(flat[0], Packing(*flat[1:], chunk=chunk), rows), first_rows
