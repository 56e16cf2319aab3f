from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placements import placement

from moe_jax.sharding import FINE, ReduceCombine, Rows, bucket
from moe_jax.sharding.rows import ladder


@given(st.integers(0, 10**6))
def test_bucket_is_the_next_power_of_two(rows: int) -> None:
    capacity = bucket(rows)
    assert capacity >= max(rows, 1)
    assert capacity & (capacity - 1) == 0
    assert capacity < 2 * max(rows, 1)


@given(st.integers(0, 10**6))
def test_fine_buckets_have_little_padding(rows: int) -> None:
    capacity = bucket(rows, FINE)
    assert max(rows, 1) <= capacity <= max(rows, 1) * (1 + 1 / FINE)
    assert bucket(capacity, FINE) == capacity


def test_there_are_few_fine_buckets() -> None:
    assert len({bucket(rows, FINE) for rows in range(1025, 2049)}) == FINE


def test_the_ladder_lists_the_buckets() -> None:
    assert list(ladder(100, FINE)) == sorted({bucket(rows, FINE) for rows in range(1, 100)} - {100})
    assert not list(ladder(1, FINE))


def test_sizes_are_large_enough_for_each_group() -> None:
    counts = [5, 0, 1, 1, 2, 2, 2, 2]
    assert Rows.of(counts, placement("dp8_ep8")).capacity == 5
    assert ReduceCombine.sized(placement("dp8_ep8"), counts, 5).total == 15
    # Two replicas of four shards: only the shards of one replica gather together.
    assert ReduceCombine.sized(placement("two_replicas_dp4_ep4"), counts, 5).total == 8


def test_sizes_of_idle_shards() -> None:
    assert Rows.of([0] * 8, placement("dp8_ep8")).capacity == 1
    assert ReduceCombine.sized(placement("dp8_ep8"), [0] * 8, 1).total == 1


@pytest.mark.parametrize(
    ("counts", "capacity", "message"),
    [
        ([1] * 7, None, "one count for each of 8 token shards"),
        ([1] * 7 + [5], 4, "between 0 and the capacity 4"),
        ([1] * 7 + [-1], None, "between 0 and the capacity"),
    ],
)
def test_invalid_counts_are_refused(counts: list[int], capacity: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rows.of(counts, placement("dp8_ep8"), capacity)
