from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from placements import PLACEMENTS, placement

from moe_jax.errors import ConfigError, PlacementError
from moe_jax.sharding import (
    AUTO,
    Combine,
    Hardware,
    Placement,
    Policy,
    RaggedCombine,
    ReduceCombine,
    ResidualLayout,
    Role,
    Route,
    RowBytes,
    ScatterCombine,
    SplitResidual,
    WholeResidual,
    as_hardware,
    as_residual_layout,
    as_strategy,
)
from moe_jax.sharding.hardware import KNOWN, Link, of_kind, save
from moe_jax.sharding.policy import STRATEGIES, Decision
from moe_jax.sharding.traffic import Kind, moves

ROW = RowBytes(gather=4096, combine=4096, metadata=64, top_k=8)
H100 = KNOWN["h100"]
NO_LATENCY = replace(H100, launch=0.0, local=replace(H100.local, latency=0.0))
MILD = [40, 30, 28, 30, 30, 30, 30, 30]
ONE_HEAVY = [1024] + [1] * 7
HALF_IDLE = [64, 0] * 4


def decide(where: str, counts: list[int], hardware: Hardware = H100, row: RowBytes = ROW) -> Decision:
    return Policy(placement(where), (row,), hardware).decide(counts, max(counts))


@pytest.mark.parametrize(
    ("where", "counts", "chosen", "reason"),
    [
        ("dp8_ep8", [16] * 8, ScatterCombine, "share expert"),
        ("dp8_ep8", MILD, ScatterCombine, "share expert"),
        ("dp8_ep8", [100 * count for count in MILD], RaggedCombine, "share expert"),
        ("dp8_ep8", ONE_HEAVY, ReduceCombine, "share expert"),
        ("dp4_ep4_tp2", [256] * 4, ScatterCombine, "share expert"),
        ("dp2_ep4", [2048] * 2, ScatterCombine, "share data"),
        ("two_replicas_dp4_ep4", [16] * 8, ScatterCombine, "share expert"),
        ("tp8_ep4", [16], ReduceCombine, "partial sums over expert, tensor, which do not split tokens"),
        ("single", [16], ReduceCombine, "the sum over no axis is the only choice"),
    ],
)
def test_decisions_follow_the_truth_table(where: str, counts: list[int], chosen: type, reason: str) -> None:
    decision = decide(where, counts)
    assert type(decision.route.combine) is chosen
    assert reason in decision.reason
    assert decision.chosen in decision.candidates
    assert decision.chosen.seconds == min(cost.seconds for cost in decision.candidates)


def test_bytes_are_counted_for_rings() -> None:
    cost = {cost.name: cost for cost in decide("dp8_ep8", [16] * 8).candidates}
    assert cost["ScatterCombine"].combine_bytes == 7 * 16 * ROW.combine
    assert cost["ScatterCombine"].gather_bytes == 7 * 16 * (ROW.gather + ROW.metadata)
    assert cost["ReduceCombine"].combine_bytes == 2 * 7 / 8 * 128 * ROW.combine
    # A scatter over two token shards, then a sum over the four devices of each.
    scatter, *_ = decide("dp2_ep4", [16] * 2).candidates
    assert scatter.combine_bytes == (16 + 2 * 3 / 4 * 16) * ROW.combine


@pytest.mark.parametrize(("counts", "limit"), [(MILD, 1.15), (ONE_HEAVY, 2.0), (HALF_IDLE, 2.0)])
def test_few_bytes_are_sent_if_bytes_decide(counts: list[int], limit: float) -> None:
    """Compare with an ideal ragged reduce-scatter, in which each device sends the real rows of the others, and with a
    packed sum."""
    decision = decide("dp8_ep8", counts, NO_LATENCY)
    ideal, packed = (passes * 7 / 8 * sum(counts) * ROW.combine for passes in (1, 2))
    sent = decision.chosen.combine_bytes
    assert sent <= limit * ideal
    assert sent <= packed


@pytest.mark.parametrize("counts", [MILD, ONE_HEAVY, HALF_IDLE, [0] * 8, [7] * 8])
@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_a_sized_strategy_holds_its_counts(strategy: type, counts: list[int]) -> None:
    sized = strategy.sized(placement("dp8_ep8"), counts, max(counts))
    assert sized.holds(counts)
    assert sized.holds([count // 2 for count in counts])
    more = [2000] * 8
    assert sized.holds(more) is issubclass(strategy, ScatterCombine)


@pytest.mark.parametrize("where", PLACEMENTS)
def test_requested_strategies_are_taken_and_the_choice_of_the_policy_is_reported(where: str) -> None:
    placed = placement(where)
    counts = [4] * placed.size(Role.TOKENS)
    policy = Policy(placed, (ROW,), H100)
    auto = policy.decide(counts, 4)
    for name, strategy in STRATEGIES.items():
        requested = replace(policy, strategy=as_strategy(name), residual=as_residual_layout("whole"))
        decision = requested.decide(counts, 4)
        assert decision.route == Route.whole(strategy.sized(placed, counts, 4))
        assert f"requested; the policy would choose {auto}" == decision.reason
    split = replace(policy, residual=as_residual_layout("split")).decide(counts, 4)
    assert type(split.route.residual) is SplitResidual
    assert as_strategy(AUTO) is None
    assert as_strategy(ScatterCombine) is ScatterCombine


@pytest.mark.parametrize("name", ["fast", 3, int, ["scatter"], Combine, ResidualLayout])
def test_unknown_strategies_and_residual_layouts_are_refused(name: object) -> None:
    for resolve, known in ((as_strategy, "scatter, reduce, ragged, all-to-all"), (as_residual_layout, "whole, split")):
        with pytest.raises(PlacementError, match=f"must be auto, {known} or a class derived from .*, got"):
            resolve(name)  # type: ignore[arg-type]


def test_both_residual_layouts_are_candidates_if_heads_are_split() -> None:
    names = {cost.name for cost in decide("dp4_ep4_tp2", [256] * 4).candidates}
    assert {"ScatterCombine", "ScatterCombine + SplitResidual"} <= names
    assert len(decide("dp8_ep8", [256] * 8).candidates) == len(STRATEGIES)
    # With a large latency per hop, few large rings are slower than many small ones.
    far = replace(H100, launch=0.0, local=replace(H100.local, latency=1.0))
    assert type(decide("dp4_ep4_tp2", [4] * 4, far).route.residual) is WholeResidual


def test_all_to_all_is_not_a_candidate_if_every_row_visits_every_device() -> None:
    names = [cost.name for cost in decide("dp8_ep8", [4] * 8, row=replace(ROW, top_k=0)).candidates]
    assert "AllToAllCombine" not in names


def test_an_axis_between_hosts_uses_the_slower_link() -> None:
    placed = Placement.parse("data=2,expert=2,tensor=2")
    pairs = replace(H100, devices_per_host=2)
    assert [pairs.crosses_hosts((axis,), placed) for axis in ("data", "expert", "tensor")] == [True, True, False]
    assert not any(H100.crosses_hosts((axis,), placed) for axis in ("data", "expert", "tensor"))
    moves = ScatterCombine(placement("dp8_ep8")).combine_moves(64, ROW)
    near, far = (h.seconds(moves, placement("dp8_ep8")) for h in (H100, pairs))
    assert far > 3 * near


TOY = Hardware(
    name="toy", devices_per_host=4, local=Link(bandwidth=100, latency=2), remote=Link(bandwidth=10, latency=5),
    launch=7, memory=1, memory_bandwidth=50, flops=1, source="made up",
)  # fmt: skip
"""Two hosts hold a mesh of `data=2,expert=4`, so that `data` lies between them."""


@pytest.mark.parametrize(
    ("kind", "axes", "rows", "row_bytes", "share", "seconds"),
    [  # launches, hops, bytes sent, and the buffers written and read
        (Kind.ALL_GATHER, ("expert",), 8, 100, 1, 7 + 3 * 2 + 3 / 4 * 800 / 100 + 2 * 800 / 50),
        (Kind.REDUCE_SCATTER, ("expert",), 40, 20, 0.5, 7 + 3 * 2 + 0.5 * 3 / 4 * 800 / 100 + 2 * 800 / 50),
        (Kind.ALL_REDUCE, ("expert",), 8, 100, 1, 7 + 6 * 2 + 2 * 3 / 4 * 800 / 100 + 2 * 800 / 50),
        (Kind.ALL_REDUCE, ("data",), 5, 20, 1, 7 + 2 * 5 + 2 * 1 / 2 * 100 / 10 + 2 * 100 / 50),
        (Kind.ALL_TO_ALL, ("expert",), 8, 100, 0.25, 7 + 2 + 0.25 * 3 / 4 * 800 / 100 + 2 * 1600 / 50),
        (Kind.RAGGED_ALL_TO_ALL, ("data", "expert"), 16, 50, 0.5, 2 * 7 + 5 + 0.5 * 7 / 8 * 800 / 10 + 2 * 1600 / 50),
    ],
)
def test_seconds_of_a_collective(
    kind: Kind, axes: tuple[str, ...], rows: int, row_bytes: int, share: float, seconds: float
) -> None:
    here = placement("two_replicas_dp4_ep4")
    made = moves(kind, axes, rows, row_bytes, here, share)
    assert TOY.seconds(made, here) == pytest.approx(seconds)
    assert TOY.seconds(2 * made, here) == pytest.approx(2 * seconds)


def test_devices_that_share_a_bandwidth_take_turns() -> None:
    """Launches and latencies are each device's own."""
    here = placement("two_replicas_dp4_ep4")
    made = moves(Kind.ALL_GATHER, ("expert",), 8, 100, here)
    assert replace(TOY, shared=True).seconds(made, here) == pytest.approx(7 + 3 * 2 + 4 * (600 / 100 + 2 * 800 / 50))
    few = placement("single")
    assert replace(TOY, shared=True).sharers(few) == 1


def test_hardware_by_name_file_and_device(tmp_path: Path) -> None:
    assert as_hardware("H100") is H100
    assert as_hardware(H100) is H100
    assert as_hardware(None) is KNOWN["cpu"]
    assert [of_kind(kind).name for kind in ("NVIDIA H200", "NVIDIA GB200", "NVIDIA A100-SXM4-80GB", "cpu")] == [
        "h200",
        "gb200",
        "a100",
        "cpu",
    ]
    save(NO_LATENCY, tmp_path / "mine.json")
    assert as_hardware(str(tmp_path / "mine.json")) == NO_LATENCY
    (tmp_path / "odd.json").write_text('{"name": "odd"}')
    stopped = json.loads((tmp_path / "mine.json").read_text()) | {"memory_bandwidth": 0}
    (tmp_path / "stopped.json").write_text(json.dumps(stopped))
    for name in ("h99", str(tmp_path / "odd.json"), str(tmp_path / "stopped.json"), str(tmp_path), 3):
        with pytest.raises(ConfigError, match=r"no hardware .*a100, h100"):
            as_hardware(name)  # type: ignore[arg-type]
