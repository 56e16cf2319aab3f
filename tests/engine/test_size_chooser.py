"""Few programs are compiled: a larger compiled step stands in for one that is needed for the first time."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import LLM, SamplingParams
from moe_jax.engine.size_chooser import PATIENCE, SizeChooser
from moe_jax.engine.sizes import Sizes, StepSize

SIZES = Sizes((None, 8), slots=64, positions=4096, prompt_rows=512, prompts=8, decode_steps=8)
NEEDS = st.tuples(st.integers(1, 64), st.sampled_from([0, 1, 100, 512]), st.integers(1, 4096), st.booleans())


def test_a_size_that_is_needed_often_is_compiled_in_the_end() -> None:
    chooser = SizeChooser()
    large, small = SIZES.step(64, 512, 4096), SIZES.step(64, 32, 128)
    assert chooser.choose(large, "greedy") == large
    assert [chooser.choose(small, "greedy") for _ in range(PATIENCE)] == [large] * PATIENCE
    assert [chooser.choose(small, "greedy") for _ in range(3)] == [small] * 3


def test_the_smallest_of_the_compiled_sizes_stands_in() -> None:
    chooser = SizeChooser()
    smaller = SIZES.step(4, 0, 4096)
    chooser.compiled |= {(size, "greedy") for size in (SIZES.step(64, 0, 4096), smaller, SIZES.step(64, 512, 4096))}
    assert chooser.choose(SIZES.step(1, 0, 16), "greedy") == smaller


@given(st.lists(NEEDS, max_size=60))
def test_a_stand_in_fits_the_step_and_has_its_outputs(needs: list[tuple[int, int, int, bool]]) -> None:
    chooser = SizeChooser()
    seen: set[tuple[StepSize, bool]] = set()
    for decoding, rows, positions, sampling in needs:
        needed = SIZES.step(decoding, rows, positions)
        chosen = chooser.choose(needed, sampling)
        assert chosen == needed or ((chosen, sampling) in seen and chosen.covers(needed))
        assert bool(chosen.prompt_rows) == bool(rows)
        assert chosen.prompt_segments >= needed.prompt_segments or chosen.chunk > needed.chunk
        seen.add((chosen, sampling))
    assert chooser.compiled == seen


def test_a_prompt_again_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The second prompt finds its beginning in the cache, so that fewer rows are left than the program has."""
    caplog.set_level(logging.INFO, "moe_jax.programs")
    llm = LLM(mesh="data=2", max_batch_size=8)
    prompt, params = "+".join(["12"] * 18) + "=", SamplingParams(temperature=0, max_tokens=4)
    first = llm.generate(prompt, params)
    compiled = llm.stats().compilations
    assert llm.generate(prompt, params)[0].outputs == first[0].outputs
    assert llm.generate("1+1=", params)
    stats = llm.stats()
    assert stats.prefix_hits > 0
    lines = [message for message in caplog.messages if message.startswith("compil")]
    assert stats.compilations == compiled == len(lines) / 2
    assert stats.compile_seconds > 0
    assert f"{compiled} programs compiled in" in str(stats)
    assert lines[0] == "compiling the step advance of 68 rows on each token shard"
    assert lines[1].startswith("compiled the step advance in")
