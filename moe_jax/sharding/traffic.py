"""What a strategy moves between devices, as data: the same that the compiled program is found to move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from moe_jax.sharding.placement import Placement


class Kind(StrEnum):
    """A collective, as HLO spells it."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"


@dataclass(frozen=True)
class Move:
    """One collective over rows."""

    kind: Kind
    axes: tuple[str, ...]
    devices: int
    """How many take part together."""
    rows: int
    """Of the whole buffer: what a gather gives to each device, and what a reduction takes from each."""

    @property
    def sent_rows(self) -> float:
        """What each device sends, by a ring: an all-reduce is a reduce-scatter and an all-gather."""
        return self.passes * self.rows * (self.devices - 1) / self.devices

    @property
    def hops(self) -> int:
        """Steps of the ring, one after the other."""
        return self.passes * (self.devices - 1)

    @property
    def passes(self) -> int:
        return 2 if self.kind is Kind.ALL_REDUCE else 1


def moves(kind: Kind, axes: tuple[str, ...], rows: int, placement: Placement) -> tuple[Move, ...]:
    """One move, or none where there are no devices or no rows to move between."""
    return (Move(kind, axes, placement.devices(axes), rows),) if axes and rows else ()


def sent_rows(of: Iterable[Move]) -> float:
    return sum(move.sent_rows for move in of)
