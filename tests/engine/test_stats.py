"""Statistics against percentiles and shares worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_jax.engine.stats import Histogram, Latency, Meter, Stats

HALF_A_BIN = math.sqrt(1.05) * (1 + 1e-9)


def histogram(seconds: list[float], times: list[int] | int = 1) -> Histogram:
    made = Histogram()
    made.add(np.array(seconds), np.array(times))
    return made


def assert_same_bin(got: float, seconds: float) -> None:
    assert seconds / HALF_A_BIN <= got <= seconds * HALF_A_BIN


def test_percentiles_pick_the_nearest_rank() -> None:
    """A hundred latencies grow by a tenth each, so no two of them share a bin."""
    latencies = [1e-4 * 1.1**rank for rank in range(100)]
    made = histogram(latencies[::2])
    made.add(np.array(latencies[1::2][::-1]), 1)
    got = Latency.of(made)
    for found, rank in ((got.p50, 50), (got.p90, 90), (got.p99, 99), (made.percentile(100), 100)):
        assert_same_bin(found, latencies[rank - 1])


@pytest.mark.parametrize("place", [0, 1, 17, 459])
def test_a_percentile_is_the_middle_of_its_bin(place: int) -> None:
    for within in (0.01, 0.5, 0.99):
        made = histogram([1e-6 * 1.05 ** (place + within)])
        assert made.percentile(50) == pytest.approx(1e-6 * 1.05 ** (place + 0.5), rel=1e-9)


def test_values_out_of_range_are_in_the_outermost_bins() -> None:
    made = histogram([0.0, 1e-9, 1e9])
    assert made.percentile(50) == pytest.approx(1e-6 * 1.05**0.5)
    assert made.percentile(99) == pytest.approx(1e-6 * 1.05**459.5)
    assert Histogram().percentile(50) == 0


def test_repeated_latencies_count_repeatedly() -> None:
    got = Latency.of(histogram([1e-3, 1.0, 1e-3], [9, 2, 9]))
    for found, seconds in ((got.p50, 1e-3), (got.p90, 1e-3), (got.p99, 1.0)):
        assert_same_bin(found, seconds)


def test_tokens_of_one_step_share_the_wait() -> None:
    """Three tokens come after 0.6 s, and two after 0.1 s. Tokens that come with a first token have no wait."""
    meter = Meter(shards=2)
    meter.record_tokens(np.array([2.0, 0.6]), np.array([4, 3]), np.array([True, False]))
    meter.record_tokens(np.array([0.1]), np.array([2]), np.array([False]))
    assert meter.generated_tokens == 4 + 3 + 2
    assert_same_bin(meter.first_token.percentile(1), 2.0)
    assert_same_bin(meter.first_token.percentile(100), 2.0)
    assert_same_bin(meter.between_tokens.percentile(40), 0.05)
    assert_same_bin(meter.between_tokens.percentile(50), 0.2)
    assert_same_bin(meter.between_tokens.percentile(100), 0.2)


def test_steps_are_weighted_by_their_rows() -> None:
    meter = Meter(shards=2)
    assert (meter.balance, meter.pad_share, meter.rows_per_shard) == (1, 0, (0, 0))
    meter.step([3, 1], capacity=4, steps=2)
    meter.step([0, 5], capacity=8, steps=1)
    rows = 2 * (3 + 1) + (0 + 5)
    assert meter.rows_per_shard == (0, 5)
    assert meter.balance == pytest.approx(rows / (2 * 2 * 3 + 2 * 5))
    assert meter.pad_share == pytest.approx(1 - rows / (2 * 2 * 4 + 2 * 8))


def test_stats_are_rounded_for_people() -> None:
    stats = Stats(
        running=1234, waiting=56789, finished=7, prompt_tokens=10**6, generated_tokens=123456, busy_seconds=10,
        first_token=Latency(0.3381, 1, 2), between_tokens=Latency(0.01234, 1, 2), rows_per_shard=(3, 4),
        balance=0.875, pad_share=0.25, cache_use=0.126, weight_bytes=1, cache_bytes=1, preemptions=0, prefix_hits=0,
        compilations=1200, compile_seconds=61.239,
    )  # fmt: skip
    assert str(stats) == (
        "12,346 tokens/s, first token 0.34 s, then 12.3 ms each, 1,234 running, 56,789 waiting, balance 88%, "
        "cache 13%, 1,200 programs compiled in 61.24 s"
    )
