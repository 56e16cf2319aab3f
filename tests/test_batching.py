from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from moe_jax.batching import assign_seats, prefill_steps

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 8))
def test_seats_are_distinct_and_shards_hold_as_many_requests(lengths: list[int], shards: int) -> None:
    seats = assign_seats(lengths, shards)
    assert len(set(seats)) == len(lengths)
    per_shard = Counter(dict.fromkeys(range(shards), 0)) + Counter(seat.shard for seat in seats)
    counts = [per_shard[shard] for shard in range(shards)]
    assert max(counts) - min(counts) <= 1
    for shard in range(shards):
        assert sorted(seat.slot for seat in seats if seat.shard == shard) == list(range(per_shard[shard]))


def test_long_prompts_are_spread() -> None:
    seats = assign_seats([100, 1, 100, 1], shards=2)
    assert {seats[0].shard, seats[2].shard} == {0, 1}


@given(LENGTHS, st.integers(1, 16))
def test_prefill_takes_every_token_once_in_order(lengths: list[int], chunk: int) -> None:
    prompts = [list(range(length)) for length in lengths]
    taken: list[list[int]] = [[] for _ in prompts]
    for step in prefill_steps(prompts, assign_seats(lengths, 3), chunk):
        for segment in step:
            assert 0 < len(segment.tokens) <= chunk
            assert segment.start == len(taken[segment.request])
            taken[segment.request] += segment.tokens
    assert taken == prompts
