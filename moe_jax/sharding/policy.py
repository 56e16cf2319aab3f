"""The one place that decides how a feed-forward combines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.errors import PlacementError
from moe_jax.sharding.combine import Combine
from moe_jax.sharding.hardware import Hardware
from moe_jax.sharding.placement import Placement
from moe_jax.sharding.strategies import RaggedCombine, ReduceCombine, ScatterCombine
from moe_jax.sharding.traffic import sent_rows

Strategy = type[Combine]
STRATEGIES: dict[str, Strategy] = {"scatter": ScatterCombine, "reduce": ReduceCombine, "ragged": RaggedCombine}
"""By the name that users ask for."""


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row on its way into a feed-forward block and out of it."""

    gather: int
    combine: int


@dataclass(frozen=True)
class Cost:
    """What one feed-forward block moves under a strategy."""

    strategy: Combine
    gather_bytes: float
    """Sent by each device."""
    combine_bytes: float
    seconds: float
    """Predicted, both ways."""

    @property
    def name(self) -> str:
        return type(self.strategy).__name__

    def as_dict(self) -> dict[str, Any]:
        return {
            "strategy": self.name,
            "gather_bytes": self.gather_bytes,
            "combine_bytes": self.combine_bytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        sent = f"{self.gather_bytes / 1024:.1f} + {self.combine_bytes / 1024:.1f} KiB"
        return f"{self.name} sends {sent} in {self.seconds * 1e6:.1f} us"


@dataclass(frozen=True)
class Decision:
    """A chosen strategy, why, and what each candidate would cost."""

    chosen: Cost
    reason: str
    candidates: tuple[Cost, ...]

    @property
    def strategy(self) -> Combine:
        return self.chosen.strategy

    @property
    def name(self) -> str:
        return self.chosen.name

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_combine(
    placement: Placement, counts: Sequence[int], *, capacity: int, row_bytes: RowBytes, hardware: Hardware
) -> Decision:
    """Choose by the mesh first, then by predicted time.

    | tokens split over a PARTIAL axis | rows per shard                      | usually chosen |
    | -------------------------------- | ----------------------------------- | -------------- |
    | no                               | any                                 | ReduceCombine  |
    | yes                              | about equal, or few                 | ScatterCombine |
    | yes                              | many, some shards with a bit more   | RaggedCombine  |
    | yes                              | many, nearly all on one of many     | ReduceCombine  |

    Args:
      counts: real rows of each token shard; the strategy will hold them and fewer.
      capacity: rows of each token shard's buffer.
    """
    candidates = tuple(
        cost_of(strategy.sized(placement, counts, capacity), capacity, row_bytes, hardware)
        for strategy in STRATEGIES.values()
    )
    if not placement.scatter_axes:
        axes = ", ".join(placement.sum_axes) or "no axis"
        (chosen,) = (cost for cost in candidates if isinstance(cost.strategy, ReduceCombine))
        return Decision(
            chosen, f"no token axis holds experts or widths, the sum over {axes} is all there is", (chosen,)
        )
    best, *others = sorted(candidates, key=lambda cost: cost.seconds)
    over = ", ".join(placement.scatter_axes)
    losers = ", ".join(f"{other.name} {other.seconds * 1e6:.1f}" for other in others)
    reason = f"tokens and partial sums share {over}; predicted {best.seconds * 1e6:.1f} us a block ({losers})"
    return Decision(best, reason, candidates)


def cost_of(strategy: Combine, capacity: int, row_bytes: RowBytes, hardware: Hardware) -> Cost:
    gather, combine = strategy.gather_moves(capacity), strategy.combine_moves(capacity)
    placement = strategy.placement
    return Cost(
        strategy,
        gather_bytes=sent_rows(gather) * row_bytes.gather,
        combine_bytes=sent_rows(combine) * row_bytes.combine,
        seconds=hardware.seconds(gather, row_bytes.gather, placement)
        + hardware.seconds(combine, row_bytes.combine, placement),
    )


def asked_strategy(wanted: str | Strategy) -> Strategy | None:
    """The strategy that a user insists on; `None` for `auto`.

    Raises:
      PlacementError: no such strategy.
    """
    if isinstance(wanted, type) and issubclass(wanted, Combine):
        return wanted
    if wanted == "auto":
        return None
    if isinstance(wanted, str) and wanted in STRATEGIES:
        return STRATEGIES[wanted]
    raise PlacementError(f"combine must be auto, {', '.join(STRATEGIES)} or a strategy class, got {wanted!r}")


@dataclass(frozen=True)
class Policy:
    """How blocks combine, for any counts: what `choose_combine` chooses, or what was asked for."""

    placement: Placement
    row_bytes: RowBytes
    hardware: Hardware
    asked: Strategy | None = None

    def decide(self, counts: Sequence[int], capacity: int) -> Decision:
        auto = choose_combine(
            self.placement, counts, capacity=capacity, row_bytes=self.row_bytes, hardware=self.hardware
        )
        if self.asked is None:
            return auto
        strategy = self.asked.sized(self.placement, counts, capacity)
        asked = cost_of(strategy, capacity, self.row_bytes, self.hardware)
        others = tuple(cost for cost in auto.candidates if cost.name != asked.name)
        return Decision(asked, f"asked for; the policy says {auto}", (asked, *others))
