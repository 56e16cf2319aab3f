from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placements import placement

from moe_jax.sharding import Rows, bucket


@given(st.integers(0, 10**6))
def test_bucket_is_the_next_power_of_two(rows: int) -> None:
    capacity = bucket(rows)
    assert capacity >= max(rows, 1)
    assert capacity & (capacity - 1) == 0
    assert capacity < 2 * max(rows, 1)


def test_sizes_come_from_the_ladder_and_hold_each_group() -> None:
    rows = Rows.of([5, 0, 1, 1, 2, 2, 2, 2], placement("dp8_ep8"))
    assert (rows.capacity, rows.total) == (8, 16)
    # Two replicas of four shards: only the shards of one replica meet in a buffer.
    rows = Rows.of([5, 0, 1, 1, 2, 2, 2, 2], placement("two_replicas_dp4_ep4"))
    assert (rows.capacity, rows.total) == (8, 8)


def test_all_idle() -> None:
    rows = Rows.of([0] * 8, placement("dp8_ep8"))
    assert (rows.capacity, rows.total) == (1, 1)


@pytest.mark.parametrize(
    ("counts", "sizes", "message"),
    [
        ([1] * 7, {}, "one count for each of 8 token shards"),
        ([1] * 7 + [5], {"capacity": 4}, "between 0 and the capacity 4"),
        ([1] * 7 + [-1], {}, "between 0 and the capacity"),
        ([4] * 8, {"capacity": 4, "total": 16}, "32 rows of shards that gather together exceed the total 16"),
    ],
)
def test_counts_that_do_not_fit(counts: list[int], sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows.of(counts, placement("dp8_ep8"), **sizes)
