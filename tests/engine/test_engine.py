"""The tokens of a request do not depend on its neighbours, its token shard, or its chunks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from moe_jax import LLM, SamplingParams
from moe_jax.engine import Generation, OutputQueue

GOLDENS = Path(__file__).parents[1] / "goldens"
WINDOWED = GOLDENS / "qwen2_moe_gqa4_e12_top2_window"
"""Checkpoint with two layers of full attention, and one with a window of four positions."""

TOKENS = np.random.default_rng(0).integers(0, 97, 48).tolist()
PROMPTS = [TOKENS[:length] for length in (1, 15, 16, 17, 33, 48)] + [[7], [5, 9, 13], [*TOKENS[:20], 1, 2, 3]]
SAMPLED: dict[str, Any] = {"logit_bias": {0: 0.0}}
"""A bias of zero, so that only the programs of sampling are compiled."""
PARAMS = [
    SamplingParams(temperature=0, max_tokens=16, **SAMPLED),
    SamplingParams(temperature=0, max_tokens=3, **SAMPLED),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5, max_tokens=10),
    SamplingParams(temperature=1.5, top_k=12, repetition_penalty=1.3, frequency_penalty=0.5, seed=6, max_tokens=16),
]


@cache
def crowded() -> LLM:
    """An engine of two token shards, each with two slots and too few pages for two of the longest sequences."""
    return LLM(
        WINDOWED, mesh="expert=2,tensor=2", dtype="float32", max_batch_size=4, prefill_tokens=20, decode_steps=3,
        cache_pages=6,
    )  # fmt: skip


@cache
def lonely() -> LLM:
    """An engine of one slot that prefills and decodes one token at a time."""
    return LLM(
        WINDOWED, mesh="data=1", dtype="float32", max_batch_size=1, prefill_tokens=1, decode_steps=1, prefix_cache=False
    )


@cache
def alone(prompt: int, params: int) -> list[int]:
    return lonely().generate([PROMPTS[prompt]], PARAMS[params])[0].token_ids


class Crowd(RuleBasedStateMachine):
    """Requests arrive, are cancelled, wait for pages, are preempted, share prefixes, and leave shards idle."""

    def __init__(self) -> None:
        super().__init__()
        self.llm, self.queue = crowded(), OutputQueue()
        self.stack = ExitStack()
        self.engine = self.stack.enter_context(self.llm.engine_loop.paused())
        self.open: dict[Generation, tuple[int, int]] = {}

    @rule(prompt=st.integers(0, len(PROMPTS) - 1), params=st.integers(0, len(PARAMS) - 1))
    def arrive(self, prompt: int, params: int) -> None:
        (group,) = self.llm.request_groups([PROMPTS[prompt]], PARAMS[params])
        generation = group.begin(0, self.queue)
        self.engine.add(generation)
        self.open[generation] = (prompt, params)

    @precondition(lambda self: self.open)
    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
        self.check()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(list(self.open)))
        self.engine.cancel(generation)
        self.check()
        assert generation not in self.open

    def check(self) -> None:
        for generation in self.queue.read():
            whole = alone(*self.open[generation])
            assert generation.tokens == whole[: len(generation.tokens)]
            if generation.finish_reason == "length":
                assert len(generation.tokens) == len(whole)
            if generation.finish_reason is not None:
                del self.open[generation]

    def teardown(self) -> None:
        steps = count()
        while self.engine.has_work:
            self.engine.step()
            assert next(steps) < 1000, "every request ends"
        self.check()
        self.stack.close()
        assert not self.open
        assert self.llm.stats().cache_use == 0


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(
    max_examples=16,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_the_crowded_engine_preempts_and_shares_prefixes() -> None:
    """Preemption and shared prefixes occur, so the state machine above covers them."""
    llm, params = crowded(), PARAMS[0]
    prompts = [*PROMPTS, *PROMPTS, *([number, *TOKENS[:39]] for number in range(8))]
    outputs = [output.token_ids for output in llm.generate(prompts, params)]
    assert outputs == [output.token_ids for output in lonely().generate(prompts, params)]
    stats = llm.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0


def test_penalties_count_the_tokens_of_prompt_and_output() -> None:
    """A huge repetition penalty lets no token occur twice."""
    llm, prompt = lonely(), PROMPTS[2]
    (plain,) = llm.generate([prompt], PARAMS[0])
    assert len({*prompt, *plain.token_ids}) < len({*prompt}) + 16
    (penalised,) = llm.generate([prompt], replace(PARAMS[0], repetition_penalty=100))
    assert len({*prompt, *penalised.token_ids}) == len({*prompt}) + 16


def test_nothing_is_compiled_after_warm_up() -> None:
    """200 requests of all kinds; every compilation of JAX counts, not only the compilation of steps."""
    llm = LLM(GOLDENS / "qwen3_moe_gqa4_e8_top2", mesh="data=2", dtype="float32", max_batch_size=2, prefill_tokens=16)
    llm.warm_up()
    random = np.random.default_rng(1)
    prompts = [random.integers(0, 97, random.integers(1, 60)).tolist() for _ in range(200)]
    params = [
        SamplingParams(
            temperature=float(random.integers(2)), top_k=int(random.integers(9)), max_tokens=int(random.integers(9)),
            logit_bias={1: 2.0} if random.integers(2) else None, seed=0,
        )
        for _ in prompts
    ]  # fmt: skip
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "backend_compile" in event:
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    outputs = llm.generate(prompts, params)
    for number in range(0, len(prompts), 25):  # the neighbours had other needs
        assert llm.generate([prompts[number]], params[number])[0].token_ids == outputs[number].token_ids
    assert not compilations
    llm.generate([[1]], SamplingParams(temperature=0, max_tokens=2, logprobs=3))
    assert compilations, "the listener works: steps with top log-probabilities were not warmed up"
