"""The one place that decides how rows go through a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import isabstract
from typing import Any, TypeVar

from moe_jax.errors import PlacementError
from moe_jax.sharding.all_to_all import AllToAllCombine
from moe_jax.sharding.combine import Combine
from moe_jax.sharding.encoding import EXACT, Encoding
from moe_jax.sharding.hardware import Hardware
from moe_jax.sharding.placement import Placement, Role
from moe_jax.sharding.residual import RESIDUALS, ResidualLayout, WholeResidual
from moe_jax.sharding.strategies import RaggedCombine, ReduceCombine, ScatterCombine
from moe_jax.sharding.traffic import RowBytes, sent_bytes

Strategy = type[Combine]
STRATEGIES: dict[str, Strategy] = {
    "scatter": ScatterCombine,
    "reduce": ReduceCombine,
    "ragged": RaggedCombine,
    "all-to-all": AllToAllCombine,
}
"""By the name that users ask for."""
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Route:
    """How rows go through every layer of a step."""

    residual: ResidualLayout
    combine: Combine
    """On the placement that the residual layout gives feed-forward blocks."""

    @classmethod
    def whole(cls, combine: Combine) -> Route:
        """With all rows of a token shard on each of its devices."""
        return cls(WholeResidual(combine.placement), combine)

    def holds(self, counts: Sequence[int], capacity: int) -> bool:
        """Whether the buffers are large enough for these counts."""
        return self.combine.holds(self.residual.counts(counts, capacity))

    @property
    def name(self) -> str:
        """As in `ScatterCombine`, or `ScatterCombine + SplitResidual`."""
        residual = () if isinstance(self.residual, WholeResidual) else (self.residual,)
        return " + ".join(type(part).__name__ for part in (self.combine, *residual))


@dataclass(frozen=True)
class Cost:
    """What all layers move on a route."""

    route: Route
    heads_bytes: float
    """Sent by each device for attention."""
    gather_bytes: float
    combine_bytes: float
    seconds: float
    """Predicted, if nothing overlaps."""

    @property
    def name(self) -> str:
        return self.route.name

    @property
    def sent_bytes(self) -> float:
        return self.heads_bytes + self.gather_bytes + self.combine_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "route": self.name,
            "heads_bytes": self.heads_bytes,
            "gather_bytes": self.gather_bytes,
            "combine_bytes": self.combine_bytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        parts = (self.heads_bytes,) * bool(self.heads_bytes) + (self.gather_bytes, self.combine_bytes)
        sent = " + ".join(f"{part / 1024:.1f}" for part in parts)
        return f"{self.name} sends {sent} KiB in {self.seconds * 1e6:.1f} us"


@dataclass(frozen=True)
class Decision:
    """A chosen route, why, and what each candidate would cost."""

    chosen: Cost
    reason: str
    candidates: tuple[Cost, ...]

    @property
    def route(self) -> Route:
        return self.chosen.route

    @property
    def name(self) -> str:
        return self.chosen.name

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Policy:
    """Chooses the route for any counts. What a user insists on, it takes, and still says what it would choose."""

    placement: Placement
    layers: tuple[RowBytes, ...]
    """Of the rows of each layer of the model, or of one alone."""
    hardware: Hardware
    strategy: Strategy | None = None
    """Insisted on."""
    residual: type[ResidualLayout] | None = None
    """Insisted on."""
    encoding: Encoding = EXACT

    def decide(self, counts: Sequence[int], capacity: int) -> Decision:
        """Choose by the mesh first, then by predicted time.

        | tokens split over a PARTIAL axis | rows per shard                      | usually chosen  |
        | -------------------------------- | ----------------------------------- | --------------- |
        | no                               | any                                 | ReduceCombine   |
        | yes                              | about equal, or few                 | ScatterCombine  |
        | yes                              | many, some shards with a bit more   | RaggedCombine   |
        | yes                              | many, nearly all on one of many     | ReduceCombine   |
        | yes, over more than `top_k`      | many, no shared expert              | AllToAllCombine |

        Where heads are split too, each is weighed with `WholeResidual` and with `SplitResidual`.

        Args:
          counts: real rows of each token shard; the route will hold them and fewer.
          capacity: rows of each token shard's buffer.
        """
        auto = self._choose(counts, capacity, None, None)
        if self.strategy is None and self.residual is None:
            return auto
        asked = self._choose(counts, capacity, self.strategy, self.residual).chosen
        others = tuple(cost for cost in auto.candidates if cost.name != asked.name)
        return Decision(asked, f"asked for; the policy says {auto}", (asked, *others))

    def _choose(
        self, counts: Sequence[int], capacity: int, strategy: Strategy | None, residual: type[ResidualLayout] | None
    ) -> Decision:
        split = self.placement.axes(Role.HEADS)
        residuals = [residual] if residual else list(RESIDUALS.values()) if split else [WholeResidual]
        candidates = tuple(
            self._cost(route, capacity)
            for kind in residuals
            for route in self._routes(kind(self.placement), strategy, counts, capacity)
        )
        best, *others = sorted(candidates, key=lambda cost: cost.seconds)
        return Decision(best, _reason(best, others), candidates)

    def _routes(
        self, residual: ResidualLayout, strategy: Strategy | None, counts: Sequence[int], capacity: int
    ) -> Iterator[Route]:
        kept, counts = residual.capacity(capacity), residual.counts(counts, capacity)
        for each in [strategy] if strategy else self._sensible(residual.ffn_placement):
            yield Route(residual, replace(each.sized(residual.ffn_placement, counts, kept), encoding=self.encoding))

    def _sensible(self, blocks: Placement) -> Sequence[Strategy]:
        if not blocks.scatter_axes:
            return [ReduceCombine]
        routed = any(row.top_k for row in self.layers)
        return [strategy for strategy in STRATEGIES.values() if routed or strategy is not AllToAllCombine]

    def _cost(self, route: Route, capacity: int) -> Cost:
        kept = route.residual.capacity(capacity)
        heads, gather, combine = (
            [move for row in self.layers for move in moves(rows, row)]
            for moves, rows in (
                (route.residual.moves, capacity),
                (route.combine.gather_moves, kept),
                (route.combine.combine_moves, kept),
            )
        )
        return Cost(
            route,
            heads_bytes=sent_bytes(heads),
            gather_bytes=sent_bytes(gather),
            combine_bytes=sent_bytes(combine),
            seconds=self.hardware.seconds((*heads, *gather, *combine), self.placement),
        )


def _reason(best: Cost, others: Sequence[Cost]) -> str:
    blocks = best.route.combine.placement
    if not others:
        return f"no token axis holds experts or widths, the sum over {_written(blocks.sum_axes)} is all there is"
    what = (
        f"tokens and partial sums share {_written(blocks.scatter_axes)}"
        if blocks.scatter_axes
        else f"sums over {_written(blocks.sum_axes)}, which split no tokens"
    )
    losers = ", ".join(f"{other.name} {other.seconds * 1e6:.1f}" for other in others)
    return f"{what}; predicted {best.seconds * 1e6:.1f} us ({losers})"


def _written(axes: tuple[str, ...]) -> str:
    return ", ".join(axes) or "no axis"


def as_strategy(wanted: str | Strategy) -> Strategy | None:
    """The strategy that a user insists on; `None` for `auto`.

    Raises:
      PlacementError: no such strategy.
    """
    return _asked("combine", wanted, STRATEGIES, Combine)


def as_residual_layout(wanted: str | type[ResidualLayout]) -> type[ResidualLayout] | None:
    """The residual that a user insists on; `None` for `auto`.

    Raises:
      PlacementError: no such residual.
    """
    return _asked("residual", wanted, RESIDUALS, ResidualLayout)


def _asked(option: str, wanted: str | T, known: Mapping[str, T], base: T) -> T | None:
    if isinstance(wanted, type) and issubclass(wanted, base) and not isabstract(wanted):
        return wanted
    if wanted == "auto":
        return None
    if isinstance(wanted, str) and wanted in known:
        return known[wanted]
    raise PlacementError(
        f"{option} must be auto, {', '.join(known)} or a class derived from {base.__name__}, got {wanted!r}"
    )
