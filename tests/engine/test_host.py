"""Host side of the engine, without devices."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorder import recorded
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from moe_jax import SamplingParams
from moe_jax.engine import Engine, Generation, OutputQueue
from moe_jax.engine.partial_outputs import StepOutput
from moe_jax.engine.sizes import Sizes
from moe_jax.errors import RequestError
from moe_jax.scheduler import Request

GREEDY = SamplingParams(temperature=0)


def serve(engine: Engine, numbers: range) -> Iterator[Generation]:
    """Serve requests of many lengths, at most a hundred waiting; yield each when it ends."""
    queue, remaining = OutputQueue(), iter(numbers)
    while True:
        while engine.waiting < 100 and (number := next(remaining, None)) is not None:
            prompt = [number % 50] * (1 + number % 40)
            engine.add(Generation(Request(number, prompt, 1 + number % 4), GREEDY, 0, frozenset(), None, queue))
        if not engine.has_work:
            return
        engine.step()
        yield from (generation for generation in queue.read() if generation.finish_reason is not None)


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def test_memory_is_constant_over_ten_thousand_requests() -> None:
    """The first count comes after the prefix cache has filled up."""
    engine, _ = recorded(positions=64, slots=4, pages=16)
    counts = []
    number = 0
    for number, generation in enumerate(serve(engine, range(10_000)), 1):
        assert len(generation.tokens) == generation.request.max_tokens
        if number in (3_000, 10_000):
            counts.append(objects())
    assert number == 10_000
    assert counts[1] < counts[0] + 2_000, "one object kept for each request would add seven thousand"
    assert engine.stats.cache_use == 0


def test_stats_count_requests_tokens_and_rows() -> None:
    engine, _ = recorded(positions=64, slots=4, pages=16)
    assert engine.stats.tokens_per_second == 0
    assert len(list(serve(engine, range(100)))) == 100
    stats = engine.stats
    assert (stats.finished, stats.running, stats.waiting) == (100, 0, 0)
    assert stats.generated_tokens == sum(1 + number % 4 for number in range(100))
    assert 0 < stats.first_token.p50 <= stats.first_token.p99
    assert 0 < stats.between_tokens.p50 < stats.first_token.p99
    assert 0 < stats.balance <= 1
    assert 0 <= stats.pad_share < 1
    assert len(stats.rows_per_shard) == 8
    assert "tokens/s" in str(stats)


def test_two_running_requests_cannot_share_an_id() -> None:
    engine, _ = recorded(positions=64, slots=4, pages=16)
    make = lambda: Generation(Request("one", [1], 2), GREEDY, 0, frozenset(), None, OutputQueue())  # noqa: E731
    engine.add(make())
    with pytest.raises(RequestError, match="there is a request 'one' already"):
        engine.add(make())
    while engine.has_work:
        engine.step()
    engine.add(make())


def test_a_request_that_can_never_run_is_refused() -> None:
    engine, _ = recorded(positions=512, slots=4, pages=16)
    with pytest.raises(RequestError, match=r"needs 20 pages of 16 positions .* but a token shard has 16"):
        engine.add(Generation(Request(0, [1] * 300, 20), GREEDY, 0, frozenset(), None, OutputQueue()))


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 700), st.integers(1, 16), st.data())
def test_every_step_has_a_size_and_there_are_few_sizes(
    slots: int, positions: int, prompt_rows: int, prompts: int, data: st.DataObject
) -> None:
    sizes = Sizes((None, 8), slots, positions, prompt_rows, prompts, decode_steps=8)
    known = set(sizes.steps())
    rows = data.draw(st.integers(0, prompt_rows))
    decoding, longest = data.draw(st.integers(0 if rows else 1, slots)), data.draw(st.integers(1, positions))
    size = sizes.step(decoding, rows, longest)
    assert size in known
    assert size.decoding >= decoding
    assert size.prompt_rows >= rows
    assert size.pages * 16 >= longest
    assert not rows or (size.prompt_segments - prompts) * size.chunk + size.chunk > rows - size.chunk
    assert len(known) <= 5 * 5 + 2 * 6 * 5


def test_stop_strings_after_a_stop_token_are_ignored() -> None:
    """The host finds stop tokens beyond the number that the devices know."""
    words = Tokenizer(WordLevel({str(number): number for number in range(40)}, unk_token="0"))
    params = SamplingParams(temperature=0, stop="9", logprobs=None)
    generation = Generation(Request("one", [1], 9), params, 0, frozenset(range(20, 40)), words, OutputQueue())
    generation.append(StepOutput([1, 25, 9], [0.0] * 3, 0, True))
    assert (generation.tokens, generation.finish_reason) == ([1, 25], "stop")
    assert "9" not in generation.text
