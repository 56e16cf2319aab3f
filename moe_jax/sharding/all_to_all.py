"""Dispatch rows only to the devices that hold their experts, for many expert shards and few experts per row.

T  own rows     s  token shards that gather together     S  the axes they gather over     k  experts per row

The bytes that a device sends grow with min(k, s), not with s. The buffers have room for the worst case, all rows of all
shards, so they cannot overflow; if the backend has `ragged_all_to_all`, only the needed rows are sent. A row is sent
once to a device, even if it visits several experts there (as in DeepEP, of DeepSeek-V3, arXiv:2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.sharding.collectives import PartialSum, all_gather, argsort, exchange, reduce_exchanged
from moe_jax.sharding.combine import Gathered, join_columns, split_columns
from moe_jax.sharding.placement import Role
from moe_jax.sharding.rows import Rows
from moe_jax.sharding.strategies import ScatterCombine
from moe_jax.sharding.traffic import Kind, Move, RowBytes, moves


@dataclass(frozen=True)
class Dispatched(Gathered):
    """Rows of all token shards that visit experts of this device. Each shard has T rows of the buffer, real ones
    first."""

    needed: Bool[Array, "s T"] = field(kw_only=True)
    """True for own rows that were sent to each device along S."""
    received: Int32[Array, "s"] = field(kw_only=True)
    """Number of rows received from each device along S."""


@dataclass(frozen=True)
class AllToAllCombine(ScatterCombine):
    """Exchange the rows of routed experts all-to-all; treat rows that every device needs (those of shared experts and
    dense MLPs) as `ScatterCombine` does."""

    def dispatch(
        self,
        rows: Rows,
        x: Float[Array, "T D"],
        experts: Int32[Array, "T k"],
        weights: Float[Array, "T k"],
        num_local_experts: int,
    ) -> Gathered:
        # all-gather of the metadata: [T, c] {V:S} -> [s*T, c]; all-to-all of the rows: [s, T, D] -> [s, T, D]
        placement, shards = self.placement, self.placement.gather_shards
        if not placement.scatter_axes:
            return super().dispatch(rows, x, experts, weights, num_local_experts)
        encoded, scales = self.encoding.encode(x)
        metadata = [all_gather(value, placement.scatter_axes) for value in join_columns(scales, experts, weights)]
        all_experts = split_columns(metadata, scales, experts, weights)[1]
        needed_here = jnp.any(all_experts // num_local_experts == placement.index(Role.EXPERTS), axis=1)
        needed_here = needed_here.reshape(shards, rows.capacity)
        expert_shards = jnp.asarray(placement.expert_shards(placement.scatter_axes))
        needed = jnp.any(experts // num_local_experts == expert_shards[:, None, None], axis=2)

        received = jnp.sum(needed_here, axis=1, dtype=jnp.int32)
        arrived = self._exchange(encoded[_true_first(needed)], jnp.sum(needed, axis=1, dtype=jnp.int32), received)
        order = _true_first(needed_here)[..., None]
        metadata = [jnp.take_along_axis(value.reshape(shards, rows.capacity, -1), order, axis=1) for value in metadata]
        hidden, *metadata = (value.reshape(shards * rows.capacity, -1) for value in (arrived, *metadata))
        scales, experts, weights = split_columns(metadata, scales, experts, weights)
        valid = (jnp.arange(rows.capacity) < received[:, None]).reshape(-1)
        values = (self.encoding.decode(hidden, scales, x.dtype), experts, weights)
        axes = placement.axes(Role.PARTIAL)
        return Dispatched(values, valid, rows, axes, placement.scatter_axes, needed=needed, received=received)

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        if not isinstance(gathered, Dispatched):
            return super().combine(gathered, partial)
        needed, capacity = gathered.needed, gathered.own.capacity

        def send_back(value: Array) -> Array:
            # [s*T, D] -> [s, T, D] -> [T, D]
            blocks = value.reshape(needed.shape[0], capacity, -1)
            returned = self._exchange(blocks, gathered.received, jnp.sum(needed, axis=1, dtype=jnp.int32))
            position = jnp.maximum(jnp.cumsum(needed, axis=1) - 1, 0)
            parts = jnp.take_along_axis(returned, position[..., None], axis=1)
            return jnp.sum(jnp.where(needed[..., None], parts, 0), axis=0, dtype=jnp.float32).astype(value.dtype)

        placement = self.placement
        return reduce_exchanged(partial, send_back, exchanged=placement.scatter_axes, sum_over=placement.sum_axes)

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        if not row.top_k:
            return super().gather_moves(capacity, row)
        placement = self.placement
        rows = capacity * placement.gather_shards
        metadata = moves(Kind.ALL_GATHER, placement.scatter_axes, rows, row.metadata, placement)
        return metadata + self._exchange_moves(capacity, row.gather, row.top_k)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        if not row.top_k:
            return super().combine_moves(capacity, row)
        placement = self.placement
        back = self._exchange_moves(capacity, row.combine, row.top_k)
        return back + moves(Kind.ALL_REDUCE, placement.sum_axes, capacity, row.combine, placement)

    def _exchange(self, blocks: Array, send_sizes: Array, recv_sizes: Array) -> Array:
        placement = self.placement
        return exchange(blocks, send_sizes, recv_sizes, placement.scatter_axes, ragged=placement.has_ragged_all_to_all)

    def _exchange_moves(self, capacity: int, row_bytes: int, top_k: int) -> tuple[Move, ...]:
        """List the exchange of the fullest shard, which takes longest. A ragged exchange sends the expected share of
        rows under an even choice of experts."""
        placement = self.placement
        rows = capacity * placement.gather_shards
        if not placement.has_ragged_all_to_all:
            return moves(Kind.ALL_TO_ALL, placement.scatter_axes, rows, row_bytes, placement)
        share = 1 - (1 - 1 / placement.size(Role.EXPERTS)) ** top_k
        return moves(Kind.RAGGED_ALL_TO_ALL, placement.scatter_axes, rows, row_bytes, placement, share)


def _true_first(needed: Bool[Array, "s T"]) -> Int32[Array, "s T"]:
    """Return the indices of true values in order, then those of the others."""
    return argsort(~needed)
