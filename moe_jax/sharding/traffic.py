"""Collectives of a strategy as data, with the rows and bytes that the compiled program moves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.sharding.encoding import EXACT, Encoding
from moe_jax.sharding.placement import Placement


class Kind(StrEnum):
    """Kind of a collective; the values are the names in HLO."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"
    ALL_TO_ALL = "all-to-all"
    RAGGED_ALL_TO_ALL = "ragged-all-to-all"


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row that enters and leaves a feed-forward block."""

    gather: int
    """Bytes of the hidden vector, encoded for the gather."""
    combine: int
    """Bytes of the hidden vector in the compute dtype."""
    metadata: int = 0
    """Bytes sent along with the hidden vector: ids and weights of its experts, and scales."""
    top_k: int = 0
    """Number of experts that a row visits; 0 if it visits every device, for a shared expert or a dense MLP."""

    @classmethod
    def of(
        cls, hidden: int, dtype: DTypeLike, *, top_k: int, shared: bool = False, encoding: Encoding = EXACT
    ) -> RowBytes:
        """Bytes of a row that visits `top_k` routed experts and, if there is a shared expert, every device.

        Args:
          hidden: width of the hidden vector.
          dtype: compute dtype.
          shared: True if the block has a shared expert.
          encoding: encoding of gathered rows.
        """
        encoded, scales = encoding.row_bytes(hidden, dtype)
        ids_and_weights = 2 * top_k * jnp.dtype(jnp.float32).itemsize
        return cls(encoded, hidden * jnp.dtype(dtype).itemsize, scales + ids_and_weights, 0 if shared else top_k)

    @property
    def gather_total(self) -> int:
        """Bytes of the encoded hidden vector and its metadata."""
        return self.gather + self.metadata


@dataclass(frozen=True)
class Move:
    """One collective over rows."""

    kind: Kind
    axes: tuple[str, ...]
    devices: int
    """Number of devices that take part together."""
    rows: int
    """Rows of the whole buffer: the output of a gather on each device, or the input of a reduction."""
    row_bytes: int
    share: float = 1.0
    """Expected fraction of the rows that is sent."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in a ring; an all-reduce is a reduce-scatter and an all-gather."""
        passes = 2 if self.kind is Kind.ALL_REDUCE else 1
        return passes * self.share * self.rows * self.row_bytes * (self.devices - 1) / self.devices

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the whole buffers on each device; an exchange has one to send from and one to receive in."""
        return self.rows * self.row_bytes * (2 if self._is_exchange else 1)

    @property
    def launches(self) -> int:
        """Number of launch latencies; for a ragged exchange, XLA:GPU first reads the sizes on the host."""
        return 2 if self.kind is Kind.RAGGED_ALL_TO_ALL else 1

    @property
    def hops(self) -> int:
        """Sequential steps of the ring; in an exchange, each device sends to all others at once."""
        return 1 if self._is_exchange else (self.devices - 1) * (2 if self.kind is Kind.ALL_REDUCE else 1)

    @property
    def _is_exchange(self) -> bool:
        return self.kind in (Kind.ALL_TO_ALL, Kind.RAGGED_ALL_TO_ALL)


def moves(
    kind: Kind, axes: tuple[str, ...], rows: int, row_bytes: int, placement: Placement, share: float = 1.0
) -> tuple[Move, ...]:
    """Return one move, or none if there are no axes or no bytes to move."""
    if not (axes and rows * row_bytes):
        return ()
    return (Move(kind, axes, placement.device_count(axes), rows, row_bytes, share),)


def sent_bytes(moves: Iterable[Move]) -> float:
    """Sum the bytes that each device sends."""
    return sum(move.sent_bytes for move in moves)
