"""Rows sent only to the devices that hold their experts, for many expert shards and few experts per row.

T  own rows     s  token shards that gather together     S  the axes they gather over     k  experts per row

What each device sends grows with min(k, s), not with s. The buffers hold the worst case, all rows of all shards, so
that none can overflow; where the backend has `ragged_all_to_all`, only the rows that are needed are sent. A row that
visits several experts of a device is sent to it once (as in DeepEP, of DeepSeek-V3, arXiv:2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.sharding.collectives import PartialSum, all_gather, argsort, exchange, reduce_exchanged
from moe_jax.sharding.combine import Gathered, apart, side_by_side
from moe_jax.sharding.placement import Role
from moe_jax.sharding.rows import Rows
from moe_jax.sharding.strategies import ScatterCombine
from moe_jax.sharding.traffic import Kind, Move, RowBytes, moves


@dataclass(frozen=True)
class Dispatched(Gathered):
    """Rows of all token shards that visit experts held here: those of each shard first in a part of T rows."""

    needed: Bool[Array, "s T"] = field(kw_only=True)
    """Which own rows each device along S was sent."""
    received: Int32[Array, "s"] = field(kw_only=True)
    """How many rows came from each."""


@dataclass(frozen=True)
class AllToAllCombine(ScatterCombine):
    """Routed rows are exchanged; those that every device needs, for a shared expert or a dense block, are scattered."""

    def dispatch(
        self, rows: Rows, x: Float[Array, "T D"], experts: Int32[Array, "T k"], weights: Float[Array, "T k"], held: int
    ) -> Gathered:
        # all-gather of what goes beside: [T, c] {V:S} -> [s*T, c]; all-to-all of the rows: [s, T, D] -> [s, T, D]
        here, shards = self.placement, self.placement.gather_shards
        if not here.scatter_axes:
            return super().dispatch(rows, x, experts, weights, held)
        sent, scales = self.encoding.encode(x)
        everyone = [all_gather(value, here.scatter_axes) for value in side_by_side(scales, experts, weights)]
        home = here.index(Role.EXPERTS)
        needed_here = jnp.any(apart(everyone, scales, experts, weights)[1] // held == home, axis=1)
        needed_here = needed_here.reshape(shards, rows.capacity)
        homes = jnp.asarray(here.expert_shards(here.scatter_axes))
        needed = jnp.any(experts // held == homes[:, None, None], axis=2)

        blocks = sent[_first_where(needed)]
        received = jnp.sum(needed_here, axis=1, dtype=jnp.int32)
        arrived = self._exchange(blocks, jnp.sum(needed, axis=1, dtype=jnp.int32), received)
        beside = [
            jnp.take_along_axis(value.reshape(shards, rows.capacity, -1), _first_where(needed_here)[..., None], axis=1)
            for value in everyone
        ]
        flat = [value.reshape(shards * rows.capacity, -1) for value in (arrived, *beside)]
        scales, experts, weights = apart(flat[1:], scales, experts, weights)
        valid = (jnp.arange(rows.capacity) < received[:, None]).reshape(-1)
        values = (self.encoding.decode(flat[0], scales, x.dtype), experts, weights)
        axes = here.axes(Role.PARTIAL)
        return Dispatched(values, valid, rows, axes, here.scatter_axes, needed=needed, received=received)

    def combine(self, gathered: Gathered, partial: PartialSum) -> Float[Array, "T D"]:
        if not isinstance(gathered, Dispatched):
            return super().combine(gathered, partial)
        needed, capacity = gathered.needed, gathered.own.capacity

        def send_back(value: Array) -> Array:
            # [s*T, D] -> [s, T, D] -> [T, D]
            blocks = value.reshape(needed.shape[0], capacity, -1)
            returned = self._exchange(blocks, gathered.received, jnp.sum(needed, axis=1, dtype=jnp.int32))
            place = jnp.maximum(jnp.cumsum(needed, axis=1) - 1, 0)
            parts = jnp.take_along_axis(returned, place[..., None], axis=1)
            return jnp.sum(jnp.where(needed[..., None], parts, 0), axis=0, dtype=jnp.float32).astype(value.dtype)

        here = self.placement
        return reduce_exchanged(partial, send_back, exchanged=here.scatter_axes, sum_over=here.sum_axes)

    def gather_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        if not row.top_k:
            return super().gather_moves(capacity, row)
        here = self.placement
        beside = moves(Kind.ALL_GATHER, here.scatter_axes, capacity * here.gather_shards, row.metadata, here)
        return beside + self._exchange_moves(capacity, row.gather, row.top_k)

    def combine_moves(self, capacity: int, row: RowBytes) -> tuple[Move, ...]:
        if not row.top_k:
            return super().combine_moves(capacity, row)
        here = self.placement
        back = self._exchange_moves(capacity, row.combine, row.top_k)
        return back + moves(Kind.ALL_REDUCE, here.sum_axes, capacity, row.combine, here)

    def _exchange(self, blocks: Array, sending: Array, receiving: Array) -> Array:
        here = self.placement
        return exchange(blocks, sending, receiving, here.scatter_axes, ragged=here.sends_ragged)

    def _exchange_moves(self, capacity: int, row_bytes: int, top_k: int) -> tuple[Move, ...]:
        """Those of the fullest shard, which last longest. Where only needed rows are sent, as many are expected as if
        each chose its experts evenly."""
        here = self.placement
        kind = Kind.RAGGED_ALL_TO_ALL if here.sends_ragged else Kind.ALL_TO_ALL
        visits = 1 - (1 - 1 / here.size(Role.EXPERTS)) ** top_k
        share = visits if here.sends_ragged else 1.0
        return moves(kind, here.scatter_axes, capacity * here.gather_shards, row_bytes, here, share)


def _first_where(needed: Bool[Array, "s T"]) -> Int32[Array, "s T"]:
    """The rows that are needed, in order, then the others."""
    return argsort(~needed)
