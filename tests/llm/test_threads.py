"""Callers share one engine: threads, coroutines, jobs with many samples, interrupts, closing and forks."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import pickle
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import jax
import pytest

from moe_jax import LLM, AsyncLLM, SamplingParams
from moe_jax.engine import Engine
from moe_jax.errors import RequestError

PROMPTS = [f"{first}+{second}=" for first in range(1, 8) for second in (2, 30, 444)]
GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
THREADS, REQUESTS = 6, 4


def make() -> LLM:
    return LLM(mesh="expert=2", dtype="float32", max_batch_size=4, decode_steps=2)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make()


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[str, str | None]:
    """Text of each prompt, decoded alone."""
    return {prompt: llm.generate(prompt, GREEDY)[0].text for prompt in PROMPTS}


def until(condition: Callable[[], bool]) -> None:
    """Wait for the engine's thread, which ends with the step that was planned ahead."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("the condition never held")


def use(llm: LLM, alone: dict[str, str | None], seed: int, requests: int) -> None:
    """Use an `LLM` in every way, at random, and check the texts."""
    choose = random.Random(seed)
    for _ in range(requests):
        prompts = choose.sample(PROMPTS, 3)
        match choose.randrange(6):
            case 0:
                events = list(llm.stream(prompts, GREEDY))
                texts = ["".join(event.text or "" for event in events if event.prompt == n) for n in range(3)]
                assert texts == [alone[prompt] for prompt in prompts]
            case 1:
                with closing(llm.stream(prompts, LONG)) as left:
                    next(left)
            case 2:
                assert llm.stats().running <= 4
                assert str(llm.explain(2))
            case 3:
                assert len(llm.logits(prompts[:1])[0]) == len(prompts[0])
            case _:
                assert [output.text for output in llm.generate(prompts, GREEDY)] == [alone[each] for each in prompts]


def stress(llm: LLM, alone: dict[str, str | None], threads: int, requests: int) -> None:
    """Run threads and coroutines beside each other."""

    async def ask(served: AsyncLLM, number: int) -> None:
        for at in range(requests):
            prompt = PROMPTS[(number * 7 + at) % len(PROMPTS)]
            if at % 3 == 2:
                task = asyncio.create_task(served.generate(prompt, LONG))
                await asyncio.sleep(0.001 * number)
                task.cancel()
            assert (await served.generate(prompt, GREEDY)).text == alone[prompt]

    async def ask_all() -> None:
        async with AsyncLLM(llm) as served:
            await asyncio.gather(*(ask(served, number) for number in range(threads)))

    with ThreadPoolExecutor(threads + 1) as pool:
        jobs = [pool.submit(use, llm, alone, seed, requests) for seed in range(threads)]
        jobs.append(pool.submit(asyncio.run, ask_all()))
        for job in jobs:
            job.result()
    with llm.engine_loop.paused() as engine:
        assert (engine.stats.running, engine.stats.waiting, engine.stats.cache_use) == (0, 0, 0)


def test_threads_and_coroutines_get_what_each_gets_alone(llm: LLM, alone: dict[str, str | None]) -> None:
    stress(llm, alone, THREADS, REQUESTS)


def test_a_failure_reaches_all_threads(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Engine) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, ThreadPoolExecutor(3) as pool:
        patch.setattr(Engine, "step", fail)
        for job in [pool.submit(llm.generate, PROMPTS[0], LONG) for _ in range(3)]:
            with pytest.raises(ZeroDivisionError):
                job.result()
    with llm.engine_loop.paused() as engine:  # the replaced step did not reset the engine
        engine._reset()
    assert llm.generate("2+2=", GREEDY)[0].text == "4"


def test_samples_of_all_callers_begin_in_turn(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda engine, each: (begun.append(each.params.max_tokens), add(engine, each)))
    many = SamplingParams(temperature=100, max_tokens=4, ignore_eos=True, n=60)
    urgent = SamplingParams(temperature=0, max_tokens=5, priority=1)
    with ThreadPoolExecutor(3) as pool:
        with llm.engine_loop.paused() as engine:
            limit = engine.max_admitted
            jobs = [pool.submit(llm.generate, PROMPTS[0], params) for params in (many, GREEDY, urgent)]
            while len(llm.engine_loop._commands) < 3:
                pass
        assert all(job.result() for job in jobs)
    assert begun[0] == 5, "the highest priority first"
    assert begun.index(6) <= 2, "then each caller in turn"
    assert len(begun) == 62
    assert limit <= 16, "few samples wait in the engine"


def test_an_interrupt_leaves_the_other_callers_alone(llm: LLM, alone: dict[str, str | None]) -> None:
    stream = llm.stream(PROMPTS, LONG)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(llm.generate, PROMPTS, GREEDY)
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
        assert [output.text for output in other.result()] == list(alone.values())


def test_closing_frees_the_memory_without_a_garbage_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        before = {id(array) for array in jax.live_arrays()}
        for way in ("close", "with", "del"):
            made = make()
            reference = weakref.ref(made)
            made.generate("1+1=", GREEDY)
            if way == "close":
                made.close()
                made.close()
                with pytest.raises(RequestError, match="this LLM was closed"):
                    made.generate("1+1=", GREEDY)
                with pytest.raises(RequestError, match="this LLM was closed"):
                    made.stats()
            elif way == "with":
                with made:
                    pass
            del made
            assert reference() is None, way
            until(lambda: all(array.ndim < 2 for array in jax.live_arrays() if id(array) not in before))
    finally:
        gc.enable()


def test_closing_ends_requests_that_run() -> None:
    made = make()
    stream = made.stream(PROMPTS, LONG)
    next(stream)
    made.close()
    with pytest.raises(RequestError, match="this LLM was closed while the request ran"):
        list(stream)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_in_words(llm: LLM, duplicate: object) -> None:
    with pytest.raises(RequestError, match="cannot be copied or pickled"):
        duplicate(llm)  # type: ignore[operator]


def _generate_in_child(llm: LLM, messages: multiprocessing.SimpleQueue[str]) -> None:
    try:
        llm.generate("1+1=", GREEDY)
        messages.put("no error")
    except RequestError as error:
        messages.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_gets_an_error_in_words(llm: LLM) -> None:
    context = multiprocessing.get_context("fork")
    messages = context.SimpleQueue()
    child = context.Process(target=_generate_in_child, args=(llm, messages))
    child.start()
    assert "make an LLM in the new process" in messages.get()
    child.join()


@pytest.mark.parametrize(("ending", "status"), [("", 0), ("raise SystemExit(3)", 3)])
def test_a_program_may_end_while_requests_run(ending: str, status: int) -> None:
    """The thread ends before the interpreter does, which would abort the process."""
    program = f"""
from moe_jax import LLM, SamplingParams
llm = LLM(mesh="data=1", dtype="float32")
events = llm.stream("1+1=", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
next(events)
{ending}
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (status, "")
