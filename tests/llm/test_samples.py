"""Several samples of one prompt: seeds, sample numbers in events, and the end of all samples."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from dataclasses import replace
from typing import Any

import pytest

from moe_jax import LLM, AsyncLLM, RequestOutput, SamplingParams, StreamEvent
from moe_jax.errors import RequestError

ONE = SamplingParams(temperature=100, max_tokens=8, seed=5, ignore_eos=True)
THREE = replace(ONE, n=3)
LONG = replace(THREE, max_tokens=60)
PROMPT = "2+2="


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(mesh="expert=2", dtype="float32", max_batch_size=4, decode_steps=2)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def tokens(output: RequestOutput) -> list[list[int]]:
    return [sample.token_ids for sample in output.outputs]


def joined(events: Iterable[StreamEvent]) -> dict[tuple[int, int], list[int]]:
    """Join the tokens of each sample of each prompt."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for event in events:
        found[event.prompt, event.sample] += event.token_ids
    return dict(found)


def test_each_sample_has_its_own_seed_and_the_first_has_the_seed_of_the_request(llm: LLM) -> None:
    (three,) = llm.generate(PROMPT, THREE)
    assert len({tuple(sample) for sample in tokens(three)}) == 3
    (one,) = llm.generate(PROMPT, ONE)
    assert three.token_ids == one.token_ids
    neighbours = [tokens(output)[0] for seed in (6, 7) for output in llm.generate(PROMPT, replace(ONE, seed=seed))]
    assert not any(sample in neighbours for sample in tokens(three)), (
        "each sample of a request differs from samples of other requests"
    )
    assert tokens(llm.generate([PROMPT, PROMPT], [ONE, THREE])[1]) == tokens(three)


def test_events_carry_the_index_of_their_sample(llm: LLM) -> None:
    prompts = [PROMPT, "1+1="]
    outputs = llm.generate(prompts, THREE)
    events = list(llm.stream(prompts, THREE))
    assert joined(events) == {
        (prompt, number): sample
        for prompt, output in enumerate(outputs)
        for number, sample in enumerate(tokens(output))
    }
    ends = [(event.prompt, event.sample) for event in events if event.finish_reason is not None]
    assert sorted(ends) == [(prompt, sample) for prompt in range(2) for sample in range(3)]


@pytest.mark.parametrize("ends", ["close", "delete", "break"])
def test_leaving_a_stream_cancels_all_samples(llm: LLM, ends: str) -> None:
    events = llm.stream(PROMPT, LONG)
    next(events)
    if ends == "close":
        events.close()
    elif ends == "delete":
        del events
    else:
        for _ in llm.stream(PROMPT, LONG):
            break
        events.close()
    with llm.engine_loop.paused() as engine:  # after the cancellations
        assert (engine.stats.running, engine.stats.waiting, engine.stats.cache_use) == (0, 0, 0)


def test_a_group_is_finished_when_all_its_samples_have_ended(llm: LLM) -> None:
    groups = llm.request_groups([PROMPT, "1+1="], replace(THREE, ignore_eos=False))
    finished = [
        (group.number, [sample.finish_reason for sample in group.output().outputs])
        for group in llm.engine_loop.finished(groups)
    ]
    assert sorted(number for number, _ in finished) == [0, 1]
    assert all(reason in ("stop", "length") for _, reasons in finished for reason in reasons)


def test_async_users_get_all_samples(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, THREE)

    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            assert tokens(await served.generate(PROMPT, THREE)) == tokens(whole)
            events = [event async for event in served.stream(PROMPT, THREE)]
            assert joined(events) == {(0, number): sample for number, sample in enumerate(tokens(whole))}
            assert sum(event.finish_reason is not None for event in events) == 3

    run(ask())


def test_cancelling_a_request_cancels_all_its_samples(llm: LLM) -> None:
    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            waiting = asyncio.create_task(served.generate(PROMPT, LONG, request_id="mine"))
            while llm.stats().running < 3:
                await asyncio.sleep(0.01)
            served.cancel("mine")
            samples = (await waiting).outputs
            assert [sample.finish_reason for sample in samples] == ["cancelled"] * 3
            assert all(len(sample.token_ids) < 60 for sample in samples)
            assert (llm.stats().running, llm.stats().cache_use) == (0, 0)

    run(ask())


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-45}, {"temperature": 1e-30}, {"top_p": 5e-324}, {"top_k": 1}, {"min_p": 1}]
)
def test_extreme_filters_leave_the_likeliest_token(llm: LLM, extreme: dict[str, Any]) -> None:
    (greedy,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=4, ignore_eos=True, **extreme))
    assert tokens(output) == tokens(greedy)


def test_extreme_penalties_and_biases_choose_a_token(llm: LLM) -> None:
    names = {"repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
    params = [SamplingParams(**{name: value}, temperature=0) for name, values in names.items() for value in values]
    biased = SamplingParams(temperature=0, logit_bias=dict.fromkeys(range(8), -100) | {3: 100}, max_tokens=3)
    *outputs, output = llm.generate([PROMPT] * (len(params) + 1), [*params, biased])
    assert all(each.finish_reason != "error" for each in outputs)
    assert output.token_ids == [3] * 3


def test_n_has_a_limit(llm: LLM) -> None:
    with pytest.raises(RequestError, match="n must be at most 1024, got 1025: use a smaller n, or raise max_n"):
        llm.generate(PROMPT, replace(ONE, n=1025))
