"""AsyncLLM: streams, cancellation, and request ids."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from moe_jax import LLM, AsyncLLM, SamplingParams, StreamEvent
from moe_jax.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENDLESS = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(mesh="expert=2", dtype="float32", max_batch_size=4, decode_steps=2)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def used_pages(llm: LLM) -> float:
    return llm.stats().cache_use


def test_concurrent_users_get_the_texts_of_each_alone(llm: LLM) -> None:
    prompts = [f"{number}+{number}=" for number in range(10)]
    alone = [output.text for output in llm.generate(prompts, GREEDY)]

    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            outputs = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in prompts))
            assert [output.text for output in outputs] == alone

    run(ask())


def test_the_events_of_a_stream_join_to_the_output(llm: LLM) -> None:
    (whole,) = llm.generate("12+34=", GREEDY)

    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            events: list[StreamEvent] = [event async for event in served.stream("12+34=", GREEDY)]
            assert "".join(event.text or "" for event in events) == whole.text
            assert [token for event in events for token in event.token_ids] == whole.token_ids
            assert [event.finish_reason for event in events][-2:] == [None, "stop"]

    run(ask())


def test_cancelling_frees_the_pages_and_gives_the_reason(llm: LLM) -> None:
    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            waiting = asyncio.create_task(served.generate("1+1=", ENDLESS, request_id="mine"))
            other = asyncio.create_task(served.generate("2+2=", GREEDY))
            while not used_pages(llm):
                await asyncio.sleep(0.01)
            served.cancel("mine")
            output = await waiting
            assert output.finish_reason == "cancelled"
            assert len(output.token_ids) < 60
            assert (await other).text == "4"
            assert used_pages(llm) == 0
            with pytest.raises(RequestError, match="there is no request 'mine' to cancel"):
                served.cancel("mine")

    run(ask())


def test_cancelled_coroutines_and_closed_streams_cancel_their_requests(llm: LLM) -> None:
    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            task = asyncio.create_task(served.generate("1+1=", ENDLESS))
            while not used_pages(llm):
                await asyncio.sleep(0.01)
            task.cancel()
            while used_pages(llm):
                await asyncio.sleep(0.01)
            async for _ in served.stream("3+3=", ENDLESS):
                break
            while used_pages(llm):
                await asyncio.sleep(0.01)

    run(ask())


def test_refused_requests_do_not_disturb_the_others(llm: LLM) -> None:
    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            first = asyncio.create_task(served.generate("1+1=", ENDLESS, request_id=7))
            await asyncio.sleep(0)
            with pytest.raises(RequestError, match="there is a request 7 already"):
                await served.generate("2+2=", GREEDY, request_id=7)
            with pytest.raises(RequestError, match="prompt 0 is empty"):
                await served.generate("", GREEDY)
            with pytest.raises(RequestError, match="prompt 0 has 70 tokens"):
                await served.generate("1" * 70, GREEDY)
            assert len((await first).token_ids) == 60
            assert (await served.generate("2+2=", GREEDY, request_id=7)).text == "4"
            assert (await served.generate("2+2=", SamplingParams(max_tokens=0))).token_ids == []

    run(ask())


def test_an_unread_stream_does_not_begin(llm: LLM) -> None:
    async def ask() -> None:
        async with AsyncLLM(llm) as served:
            for _ in range(2):
                unread = served.stream("1+1=", ENDLESS, request_id="mine")
                await asyncio.sleep(0.05)
                assert not used_pages(llm)
                del unread
            nothing = [event async for event in served.stream("1+1=", SamplingParams(max_tokens=0))]
            assert [(event.text, event.token_ids, event.finish_reason) for event in nothing] == [("", [], "length")]

    run(ask())


def test_a_failure_of_the_engine_reaches_all_callers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that arrive during the failure get the error, too."""
    failing = threading.Event()

    def fail() -> None:
        failing.set()
        time.sleep(0.2)
        raise ZeroDivisionError

    async def ask() -> None:
        served = AsyncLLM(llm)
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine_loop.engine, "step", fail)
            first = asyncio.create_task(served.generate("1+1=", GREEDY))
            while not failing.is_set():
                await asyncio.sleep(0.01)
            for task in (first, asyncio.create_task(served.generate("2+2=", GREEDY))):
                with pytest.raises(ZeroDivisionError):
                    await task
        assert (await served.generate("2+2=", GREEDY)).text == "4", "the engine starts afresh"
        await served.close()
        with pytest.raises(RequestError, match="this AsyncLLM was closed"):
            await served.generate("1+1=", GREEDY)

    run(ask())
