from __future__ import annotations

import pytest
from placements import PLACEMENTS, placement

from moe_jax.errors import PlacementError
from moe_jax.sharding import ReduceCombine, Role, Rows, ScatterCombine, asked_strategy, choose_combine, decide

ROW = 4096


@pytest.mark.parametrize(
    ("where", "sizes", "chosen", "reason"),
    [
        ("dp8_ep8", (16, 128), ScatterCombine, "share expert"),
        ("dp8_ep8", (64, 64), ReduceCombine, "few rows of the shards over expert"),
        ("dp4_ep4_tp2", (16, 64), ScatterCombine, "share expert"),
        ("dp2_ep4", (16, 32), ScatterCombine, "share data"),
        ("two_replicas_dp4_ep4", (16, 64), ScatterCombine, "share expert"),
        ("tp8_ep4", (16, 16), ReduceCombine, "the sum over expert, tensor is all there is"),
        ("single", (16, 16), ReduceCombine, "the sum over no axis is all there is"),
    ],
)
def test_truth_table(where: str, sizes: tuple[int, int], chosen: type, reason: str) -> None:
    decision = choose_combine(placement(where), capacity=sizes[0], total=sizes[1], row_bytes=ROW)
    assert type(decision.strategy) is chosen
    assert reason in decision.reason
    assert set(decision.sent_bytes) == {"ScatterCombine", "ReduceCombine"}


def test_bytes_are_those_of_rings() -> None:
    sent = choose_combine(placement("dp8_ep8"), capacity=16, total=128, row_bytes=ROW).sent_bytes
    assert sent == {"ScatterCombine": 7 * 16 * ROW, "ReduceCombine": 2 * 7 / 8 * 128 * ROW}
    # Scatter over two token shards, then the sum over the four devices of each.
    sent = choose_combine(placement("dp2_ep4"), capacity=16, total=32, row_bytes=ROW).sent_bytes
    assert sent["ScatterCombine"] == (16 + 2 * 3 / 4 * 16) * ROW


@pytest.mark.parametrize("where", PLACEMENTS)
def test_what_is_asked_for_is_taken_and_the_policy_still_heard(where: str) -> None:
    here = placement(where)
    rows = Rows.of([4] * here.size(Role.TOKENS), here)
    assert decide(None, here, rows, ROW) == choose_combine(here, capacity=4, total=rows.total, row_bytes=ROW)
    for name, strategy in (("scatter", ScatterCombine), ("reduce", ReduceCombine)):
        asked = asked_strategy(name, here)
        assert asked == strategy(here)
        assert decide(asked, here, rows, ROW).strategy is asked
        assert "asked for; the policy says" in decide(asked, here, rows, ROW).reason
    assert asked_strategy("auto", here) is None
    own = ScatterCombine(here)
    assert asked_strategy(own, here) is own


def test_strange_wishes() -> None:
    here, there = placement("dp8_ep8"), placement("dp4_ep4_tp2")
    with pytest.raises(PlacementError, match="auto, scatter, reduce or a strategy, got 'fast'"):
        asked_strategy("fast", here)
    with pytest.raises(PlacementError, match="made for"):
        asked_strategy(ScatterCombine(there), here)
