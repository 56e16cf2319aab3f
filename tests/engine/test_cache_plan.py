"""The cache takes a modest share of the free memory, or what its options say."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from moe_jax import LLM, SamplingParams
from moe_jax.analysis.roofline import held_bytes
from moe_jax.analysis.units import format_bytes
from moe_jax.checkpoints import Checkpoint
from moe_jax.engine import CachePlan, Options, plan_cache
from moe_jax.engine.cache_plan import ACCELERATOR_SHARE, CPU_SHARE, _Attempt
from moe_jax.errors import RequestError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE
from moe_jax.sharding import Placement

GOLDENS = Path(__file__).parents[1] / "goldens"
ONE_WINDOW, TWO_WINDOWS = GOLDENS / "qwen3_moe_gqa4_e8_top2", GOLDENS / "qwen2_moe_gqa4_e12_top2_window"
POSITIONS = 64


def decoder(path: Path = ONE_WINDOW, mesh: str = "data=2") -> ShardedDecoder:
    return ShardedDecoder(Checkpoint(path).config, Placement.parse(mesh), "float32")


def plan(room: float, path: Path = ONE_WINDOW, **options: int | float | None) -> CachePlan:
    """Plan a cache with `room` free bytes on each device besides the weights."""
    made = decoder(path)
    return plan_cache(Options(**options), made, held_bytes(made.parameters) + room)  # type: ignore[arg-type]


def bytes_of(length: int, path: Path = ONE_WINDOW) -> int:
    """Return the bytes on each device of a cache for one sequence."""
    attempt = _Attempt(Options(length), decoder(path), 0)
    return attempt._bytes(attempt.one_sequence)


@pytest.mark.parametrize("path", [ONE_WINDOW, TWO_WINDOWS])
@pytest.mark.parametrize("mebibytes", [1, 3, 10, 100, 10_000])
def test_the_default_cache_takes_a_tenth_of_the_free_memory_at_most(path: Path, mebibytes: int) -> None:
    room = mebibytes * 2**20
    made = plan(room, path)
    assert made.bytes_per_device <= CPU_SHARE * room
    assert made.max_length == POSITIONS
    caches = decoder(path).abstract_caches(made.pages, PAGE, made.sizes.slots)
    assert made.bytes_per_device == held_bytes(caches)


def test_much_memory_gives_all_pages_that_can_be_in_use() -> None:
    assert plan(1e12).pages == {None: 128 * POSITIONS // PAGE}
    assert plan(1e12, max_batch_size=8).pages == {None: 4 * POSITIONS // PAGE}


@pytest.mark.parametrize("path", [ONE_WINDOW, TWO_WINDOWS])
def test_sequences_are_shorter_where_the_default_cache_holds_no_longer_ones(path: Path) -> None:
    for length in (32, 16):
        made = plan(bytes_of(length, path) / CPU_SHARE * 1.01, path)
        assert made.max_length == length
        assert made.bytes_per_device <= bytes_of(length, path) * 1.01


def test_a_requested_length_takes_more_than_the_default_share() -> None:
    """The cache holds one sequence then, on each token shard."""
    room = bytes_of(POSITIONS) / ACCELERATOR_SHARE * 1.01
    made = plan(room, max_length=POSITIONS)
    assert (made.max_length, made.pages) == (POSITIONS, {None: POSITIONS // PAGE})
    with pytest.raises(RequestError, match=r"sequence of 64 positions needs 4: set max_length=32, .* raise cache_mem"):
        plan(room * 0.9, max_length=POSITIONS)
    plan(room * 0.9, max_length=32)


def test_options_for_the_memory_are_honoured() -> None:
    room = bytes_of(POSITIONS) * 10.01
    assert plan(room, cache_memory=0.5).pages == {None: 5 * POSITIONS // PAGE}
    assert plan(0, cache_pages=5).pages == {None: 5}
    with pytest.raises(RequestError, match=r"room for 3 pages .* set max_length=32, lower max_batch_size, raise cache"):
        plan(room, cache_memory=0.09)


@pytest.mark.parametrize("free", [-1e9, 0, 1000])
def test_no_memory_is_an_error_in_words(free: float) -> None:
    with pytest.raises(RequestError, match=r"room for 0 pages of 16 positions .*: lower max_batch_size, raise cache_m"):
        plan(free)


def test_the_cache_is_reported(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder()
    free = held_bytes(made.parameters) + bytes_of(32) / CPU_SHARE * 1.01
    monkeypatch.setattr("moe_jax.llm.llm.free_memory", lambda _: free)
    with caplog.at_level(logging.INFO, "moe_jax"), LLM(ONE_WINDOW, mesh="data=2", dtype="float32") as llm:
        assert llm.max_length == 32
        (line,) = (record.message for record in caplog.records if "KV cache" in record.message)
        assert "MiB on 2 devices, for sequences of up to 32 of the model's 64 positions; cache_memory, cache_" in line
        stats, explanation = llm.stats(), llm.explain(2)
        assert (stats.weight_bytes, stats.cache_bytes) == (held_bytes(made.parameters), bytes_of(32))
        assert explanation.as_dict()["engine_cache_bytes"] == bytes_of(32)
        assert explanation.as_dict()["free_bytes"] == free
        weights, cache = format_bytes(stats.weight_bytes), format_bytes(stats.cache_bytes)
        assert f"engine       holds {weights} weights + {cache} cache = " in str(explanation)
        (output,) = llm.generate([[1] * 30], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
        assert len(output.token_ids) == 3


def test_a_plan_fits_only_if_all_devices_that_share_the_memory_fit() -> None:
    with LLM(ONE_WINDOW, mesh="data=2", dtype="float32") as llm:
        explanation = llm.explain(2)
        assert explanation.fits
        llm._cache = replace(llm._cache, free_bytes=explanation.memory_bytes - 1)
        assert not llm.explain(2).fits
