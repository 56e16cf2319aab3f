"""What a strategy moves between devices, as data: the same that the compiled program is found to move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.sharding.encoding import EXACT, Encoding
from moe_jax.sharding.placement import Placement


class Kind(StrEnum):
    """A collective, as HLO spells it."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"
    ALL_TO_ALL = "all-to-all"
    RAGGED_ALL_TO_ALL = "ragged-all-to-all"


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row on its way into a feed-forward block and out of it."""

    gather: int
    """Of the hidden vector, as it is sent."""
    combine: int
    """Of the hidden vector."""
    metadata: int = 0
    """Of what is sent with the hidden vector: ids and weights of its experts, and scales."""
    top_k: int = 0
    """How many experts a row visits; 0 where it visits every device, for a shared expert or a dense block."""

    @classmethod
    def of(
        cls, hidden: int, dtype: DTypeLike, *, top_k: int, shared: bool = False, encoding: Encoding = EXACT
    ) -> RowBytes:
        """Of rows that visit `top_k` routed experts and, if there is a shared expert, every device."""
        sent, scales = encoding.row_bytes(hidden, dtype)
        ids_and_weights = 2 * top_k * jnp.dtype(jnp.float32).itemsize
        return cls(sent, hidden * jnp.dtype(dtype).itemsize, scales + ids_and_weights, 0 if shared else top_k)

    @property
    def all(self) -> int:
        return self.gather + self.metadata


@dataclass(frozen=True)
class Move:
    """One collective over rows."""

    kind: Kind
    axes: tuple[str, ...]
    devices: int
    """How many take part together."""
    rows: int
    """Of the whole buffer: what a gather gives to each device, and what a reduction takes from each."""
    row_bytes: int
    share: float = 1.0
    """The part of the rows that is expected to be sent, where not all are."""

    @property
    def sent_bytes(self) -> float:
        """What each device sends, by a ring: an all-reduce is a reduce-scatter and an all-gather."""
        passes = 2 if self.kind is Kind.ALL_REDUCE else 1
        return passes * self.share * self.rows * self.row_bytes * (self.devices - 1) / self.devices

    @property
    def buffer_bytes(self) -> int:
        """Of the buffers that each device holds whole: an exchange has one to send from and one to receive in."""
        return self.rows * self.row_bytes * (2 if self._is_exchange else 1)

    @property
    def launches(self) -> int:
        """How often the device is kept waiting: XLA:GPU reads the sizes of a ragged exchange on the host first."""
        return 2 if self.kind is Kind.RAGGED_ALL_TO_ALL else 1

    @property
    def hops(self) -> int:
        """Steps of the ring, one after the other; in an exchange all devices send to all others at once."""
        return 1 if self._is_exchange else (self.devices - 1) * (2 if self.kind is Kind.ALL_REDUCE else 1)

    @property
    def _is_exchange(self) -> bool:
        return self.kind in (Kind.ALL_TO_ALL, Kind.RAGGED_ALL_TO_ALL)


def moves(
    kind: Kind, axes: tuple[str, ...], rows: int, row_bytes: int, placement: Placement, share: float = 1.0
) -> tuple[Move, ...]:
    """One move, or none where there are no devices or nothing to move between."""
    return (
        (Move(kind, axes, placement.device_count(axes), rows, row_bytes, share),) if axes and rows * row_bytes else ()
    )


def sent_bytes(of: Iterable[Move]) -> float:
    return sum(move.sent_bytes for move in of)
