"""Pages of attention windows in dispatches of many decode steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_jax import LLM, SamplingParams
from moe_jax.engine.sizes import MAX_SEGMENT_ROWS, Sizes, max_pages
from moe_jax.errors import RequestError
from moe_jax.programs import PAGE
from moe_jax.scheduler import CacheGroup

GOLDENS = Path(__file__).parents[1] / "goldens"
GREEDY = SamplingParams(temperature=0, max_tokens=100)
PROMPT = list(range(1, 19))


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Checkpoint with 128 positions."""
    copy = Path(shutil.copytree(GOLDENS / request.param, tmp_path / request.param))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    return copy


def pages_read(group: CacheGroup, start: int, rows: int) -> int:
    """Number of pages that rows from `start` on attend to."""
    return -(-(start + rows) // PAGE) - group.first_page(start, PAGE)


@pytest.mark.parametrize("window", [1, 2, 4, 15, 16, 17, 18, 128, 512])
def test_page_table_of_a_window_holds_the_pages_of_all_steps_of_a_dispatch(window: int) -> None:
    group, positions = CacheGroup(1, window), 2 * window + 2 * PAGE
    for steps in (1, 2, 63, 64, 65, 66, 67, 68, 78, 79, 80, 81, 500):
        sizes = Sizes((window,), slots=1, positions=positions + steps, prompt_rows=32, prompts=1, decode_steps=steps)
        largest = max(pages_read(group, start, steps) for start in range(positions))
        assert largest == max_pages(window, positions + steps, steps), "no page is missing, and none is in excess"
        for start in range(positions):
            ((_, table),) = sizes.step(1, 0, start + steps).shape.tables
            assert table >= pages_read(group, start, steps)
        assert sizes.needed_pages(window) >= max(largest, max_pages(window, positions + steps, sizes.prompt_rows))


@pytest.mark.parametrize("window", [1, 4, 17, 128])
def test_page_table_of_a_window_holds_the_pages_of_a_prompt_segment(window: int) -> None:
    group, sizes = CacheGroup(1, window), Sizes((window,), 1, 512, prompt_rows=512, prompts=1, decode_steps=1)
    for start in range(512 - MAX_SEGMENT_ROWS):
        size = sizes.step(0, 512, start + MAX_SEGMENT_ROWS)
        ((_, table),) = size.shape.tables
        assert size.chunk == MAX_SEGMENT_ROWS
        assert table >= pages_read(group, start, size.chunk)


@pytest.mark.parametrize(
    "checkpoint", ["mixtral_gqa2_e6_top1_window", "llama4_text_gqa2_e8_top1"], indirect=True, ids=["sliding", "chunked"]
)
def test_a_dispatch_of_many_steps_slides_windows(checkpoint: Path) -> None:
    """One dispatch of 99 steps generates the same tokens as shorter ones."""
    llm = LLM(checkpoint, mesh="data=1", dtype="float32", max_batch_size=1, prefill_tokens=128, decode_steps=100)
    ((output,),) = (result.outputs for result in llm.generate([PROMPT], GREEDY))
    assert len(output.token_ids) == 100
    continued = llm.generate([PROMPT + output.token_ids[:50]], SamplingParams(temperature=0, max_tokens=50))
    assert continued[0].outputs[0].token_ids == output.token_ids[50:]


@pytest.mark.parametrize("checkpoint", ["mixtral_gqa2_e6_top1_window"], indirect=True)
def test_too_few_pages_are_refused_with_a_number_that_works(checkpoint: Path) -> None:
    def llm(cache_pages: int) -> LLM:
        return LLM(checkpoint, mesh="data=1", dtype="float32", decode_steps=100, cache_pages=cache_pages)

    for cache_pages in (1, 7):
        with pytest.raises(RequestError, match=f"room for {cache_pages} pages .* needs 8: set cache_pages to 8 "):
            llm(cache_pages)
    assert llm(8).max_length == 128
