"""The one place that decides how a feed-forward combines."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.errors import PlacementError
from moe_jax.sharding.combine import Combine, ReduceCombine, ScatterCombine
from moe_jax.sharding.placement import Placement
from moe_jax.sharding.rows import Rows


@dataclass(frozen=True)
class Decision:
    """A chosen strategy, why, and what each candidate would send."""

    strategy: Combine
    reason: str
    sent_bytes: dict[str, float]
    """Bytes that each device sends in one combine, by strategy."""

    @property
    def name(self) -> str:
        return type(self.strategy).__name__

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def choose_combine(placement: Placement, *, capacity: int, total: int, row_bytes: int) -> Decision:
    """Choose by the mesh first, then by bytes.

    | tokens split over a PARTIAL axis | bytes sent                | chosen         |
    | -------------------------------- | ------------------------- | -------------- |
    | no                               |                           | ReduceCombine  |
    | yes                              | scatter <= reduce         | ScatterCombine |
    | yes                              | scatter > reduce (much padding) | ReduceCombine  |

    Args:
      capacity, total: the sizes of `Rows`: rows per token shard, and rows of a group packed together.
      row_bytes: hidden width times the bytes of its dtype.
    """
    candidates = (ScatterCombine(placement), ReduceCombine(placement))
    scatter, reduce = candidates
    sent = {type(c).__name__: c.sent_rows(capacity, total) * row_bytes for c in candidates}
    if not placement.scatter_axes:
        axes = ", ".join(placement.sum_axes) or "no axis"
        return Decision(reduce, f"no token axis holds experts or widths, the sum over {axes} is all there is", sent)
    over = ", ".join(placement.scatter_axes)
    least, most = (f"{amount / 1024:.1f} KiB" for amount in sorted(sent.values()))
    if scatter.sent_rows(capacity, total) <= reduce.sent_rows(capacity, total):
        return Decision(
            scatter, f"tokens and partial sums share {over}; it sends {least} where a sum sends {most}", sent
        )
    return Decision(
        reduce,
        f"few rows of the shards over {over} are real; packed, it sends {least} where a scatter sends {most}",
        sent,
    )


Wanted = str | Combine
"""What users may ask for: `auto`, `scatter`, `reduce`, or a strategy of their own."""


def asked_strategy(wanted: Wanted, placement: Placement) -> Combine | None:
    """The strategy that a user insists on; `None` for `auto`.

    Raises:
      PlacementError: no such strategy, or one made for another placement.
    """
    match wanted:
        case "auto":
            return None
        case "scatter":
            return ScatterCombine(placement)
        case "reduce":
            return ReduceCombine(placement)
        case Combine() if wanted.placement == placement:
            return wanted
        case Combine():
            raise PlacementError(f"the strategy was made for {wanted.placement}, the model is on {placement}")
    raise PlacementError(f"combine must be auto, scatter, reduce or a strategy, got {wanted!r}")


def decide(asked: Combine | None, placement: Placement, rows: Rows, row_bytes: int) -> Decision:
    """What `choose_combine` chooses, or the strategy asked for, with what it costs and what would have been chosen."""
    decision = choose_combine(placement, capacity=rows.capacity, total=rows.total, row_bytes=row_bytes)
    if asked is None:
        return decision
    sent = decision.sent_bytes | {type(asked).__name__: asked.sent_rows(rows.capacity, rows.total) * row_bytes}
    return Decision(asked, f"asked for; the policy says {decision}", sent)
