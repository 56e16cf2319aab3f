"""The policy: choose the strategy and the residual layout that move the rows of a step in the least time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import isabstract
from typing import Any, TypeVar

from moe_jax.config.choices import AUTO
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
"""Strategies by the value of the option `combine`."""
T = TypeVar("T", bound=type)


@dataclass(frozen=True)
class Route:
    """Residual layout and strategy of every layer of a step."""

    residual: ResidualLayout
    combine: Combine
    """Strategy, on the `ffn_placement` of the residual layout."""

    @classmethod
    def whole(cls, combine: Combine) -> Route:
        """Create a route with `WholeResidual`: all rows of a token shard on each of its devices."""
        return cls(WholeResidual(combine.placement), combine)

    def holds(self, counts: Sequence[int], capacity: int) -> bool:
        """Return True if the buffers are large enough for these counts."""
        return self.combine.holds(self.residual.counts(counts, capacity))

    @property
    def name(self) -> str:
        """Name such as `ScatterCombine` or `ScatterCombine + SplitResidual`."""
        residual = () if isinstance(self.residual, WholeResidual) else (self.residual,)
        return " + ".join(type(part).__name__ for part in (self.combine, *residual))


@dataclass(frozen=True)
class Cost:
    """Bytes and time of the collectives of all layers on a route."""

    route: Route
    heads_bytes: float
    """Bytes that each device sends for attention."""
    gather_bytes: float
    """Bytes that each device sends to gather rows."""
    combine_bytes: float
    """Bytes that each device sends to combine outputs."""
    seconds: float
    """Predicted time, without overlap."""

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
    """The chosen route, the reason, and the cost of each candidate."""

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
    """Choose a route for given counts. A requested strategy or residual layout overrides the choice."""

    placement: Placement
    layers: tuple[RowBytes, ...]
    """Bytes of a row in each layer of the model, or in a single layer."""
    hardware: Hardware
    strategy: Strategy | None = None
    """Requested strategy; `None` leaves the choice to the policy."""
    residual: type[ResidualLayout] | None = None
    """Requested residual layout; `None` leaves the choice to the policy."""
    encoding: Encoding = EXACT
    """Encoding of gathered rows."""

    def decide(self, counts: Sequence[int], capacity: int) -> Decision:
        """Choose the route with the least predicted time among those that make sense on the mesh.

        | tokens split over a PARTIAL axis | rows per shard                      | usually chosen  |
        | -------------------------------- | ----------------------------------- | --------------- |
        | no                               | any                                 | ReduceCombine   |
        | yes                              | about equal, or few                 | ScatterCombine  |
        | yes                              | many, a few more on some shards     | RaggedCombine   |
        | yes                              | many, nearly all on one shard       | ReduceCombine   |
        | yes, over more than `top_k`      | many, no shared expert              | AllToAllCombine |

        If heads are split too, each strategy is considered with `WholeResidual` and with `SplitResidual`.

        Args:
          counts: real rows of each token shard; the route holds these counts and smaller ones.
          capacity: rows of each token shard's array.
        """
        auto = self._choose(counts, capacity, None, None)
        if self.strategy is None and self.residual is None:
            return auto
        requested = self._choose(counts, capacity, self.strategy, self.residual).chosen
        others = tuple(cost for cost in auto.candidates if cost.name != requested.name)
        return Decision(requested, f"requested; the policy would choose {auto}", (requested, *others))

    def _choose(
        self, counts: Sequence[int], capacity: int, strategy: Strategy | None, residual: type[ResidualLayout] | None
    ) -> Decision:
        splits_heads = bool(self.placement.axes(Role.HEADS))
        layouts = [residual] if residual else list(RESIDUALS.values()) if splits_heads else [WholeResidual]
        candidates = tuple(
            self._cost(route, capacity)
            for layout in layouts
            for route in self._routes(layout(self.placement), strategy, counts, capacity)
        )
        best, *others = sorted(candidates, key=lambda cost: cost.seconds)
        return Decision(best, _reason(best, others), candidates)

    def _routes(
        self, residual: ResidualLayout, strategy: Strategy | None, counts: Sequence[int], capacity: int
    ) -> Iterator[Route]:
        kept, counts = residual.capacity(capacity), residual.counts(counts, capacity)
        placement = residual.ffn_placement
        for each in [strategy] if strategy else self._strategies(placement):
            yield Route(residual, replace(each.sized(placement, counts, kept), encoding=self.encoding))

    def _strategies(self, placement: Placement) -> Sequence[Strategy]:
        """Return the strategies that make sense on a placement of feed-forward blocks."""
        if not placement.scatter_axes:
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
    placement = best.route.combine.placement
    if not others:
        sums = _format(placement.sum_axes)
        return f"no axis splits both tokens and partial sums, so the sum over {sums} is the only choice"
    axes = (
        f"tokens and partial sums share {_format(placement.scatter_axes)}"
        if placement.scatter_axes
        else f"partial sums over {_format(placement.sum_axes)}, which do not split tokens"
    )
    costs = ", ".join(f"{other.name} {other.seconds * 1e6:.1f}" for other in others)
    return f"{axes}; predicted {best.seconds * 1e6:.1f} us ({costs})"


def _format(axes: tuple[str, ...]) -> str:
    return ", ".join(axes) or "no axis"


def as_strategy(name: str | Strategy) -> Strategy | None:
    """Return the strategy with a name, or `None` for `"auto"`: the policy then chooses. Classes are returned as is.

    Raises:
      PlacementError: no such strategy.
    """
    return _resolve("combine", name, STRATEGIES, Combine)


def as_residual_layout(name: str | type[ResidualLayout]) -> type[ResidualLayout] | None:
    """Return the residual layout with a name, or `None` for `"auto"`: the policy then chooses. Classes are returned as
    is.

    Raises:
      PlacementError: no such residual layout.
    """
    return _resolve("residual", name, RESIDUALS, ResidualLayout)


def _resolve(option: str, name: str | T, known: Mapping[str, T], base: T) -> T | None:
    if isinstance(name, type) and issubclass(name, base) and not isabstract(name):
        return name
    if name == AUTO:
        return None
    if isinstance(name, str) and name in known:
        return known[name]
    raise PlacementError(
        f"{option} must be {AUTO}, {', '.join(known)} or a class derived from {base.__name__}, got {name!r}"
    )
