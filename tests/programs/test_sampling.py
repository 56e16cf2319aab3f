"""Against NumPy on whole rows: the same tokens on any number of heads devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import SamplingParams
from moe_jax.analysis.census import collectives, sent_bytes
from moe_jax.programs.sampling import (
    NOWHERE,
    SamplerInputs,
    SamplerOutput,
    SamplingMetadata,
    TokenLogprobs,
    _fall,
    logprobs_of,
    sample,
)
from moe_jax.sharding import Placement, Role

PLACES = {1: "data=1", 2: "data=2,tensor=2", 4: "tensor=4"}
"""By the number of heads devices; with two, there are two token shards, which may go through different branches."""
HEADS = pytest.mark.parametrize("heads", PLACES)
TOP = 3
PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
DRAWS = 4000


@dataclass(frozen=True)
class StepFlags:
    params: SamplingParams
    seed: int = 0
    prompt: Sequence[int] = (0,)
    stop_ids: Collection[int] = ()


@cache
def program(heads: int, vocab_size: int, top: int) -> Any:
    """`sample`, of whole logits that are padded as the LM head's are, with rubbish."""
    here = Placement.parse(PLACES[heads])
    rows = here.spec((Role.TOKENS,), (0,))

    def run(logits: Any, sampling: Any, *rest: Any) -> SamplerOutput:
        return sample(logits, vocab_size, here, None if sampling is None else SamplerInputs(sampling, *rest), top=top)

    specs = here.spec((Role.TOKENS, Role.HEADS), (0, 0)), rows, rows, rows
    return jax.jit(jax.shard_map(run, mesh=here.mesh, in_specs=specs, out_specs=rows))


def padded(logits: np.ndarray, heads: int) -> np.ndarray:
    logits = np.asarray(logits, np.float32)
    rubbish = np.resize([np.nan, np.inf, 1e9], (-logits.shape[1] % heads + 2 * heads))
    return np.concatenate([logits, np.broadcast_to(rubbish, (len(logits), len(rubbish)))], axis=1, dtype=np.float32)


def run(
    heads: int,
    logits: np.ndarray,
    requests: Sequence[StepFlags | None] | None = None,
    outputs: Sequence[Sequence[int]] = (),
    *,
    generated: Sequence[int] | None = None,
    top: int = 0,
) -> SamplerOutput:
    outputs = outputs or [()] * len(logits)
    made = np.array([len(output) for output in outputs] if generated is None else generated, np.int32)
    history, sampling = None, None
    if requests is not None:
        sampling = SamplingMetadata.of(requests)
        history = np.full((len(logits), 24), 3, np.int32)
        for row, request, output in zip(history, requests, outputs, strict=True):
            tokens = [*(request.prompt if request else ()), *output]
            row[: len(tokens)] = tokens
    return jax.device_get(program(heads, logits.shape[1], top)(padded(logits, heads), sampling, made, history))


def uniform(seed: int, generated: int) -> float:
    return float(jax.random.uniform(jax.random.fold_in(jax.random.key(seed), generated)))


def changed(logits: np.ndarray, flags: StepFlags, output: Sequence[int]) -> np.ndarray:
    params, logits = flags.params, logits.astype(np.float32)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += np.float32(bias)
    for token in {*flags.prompt, *output}:
        penalty = np.float32(params.repetition_penalty)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token, times in Counter(output).items():
        logits[token] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * np.float32(times)
    if len(output) < params.min_tokens:
        logits[list(flags.stop_ids)] = -np.inf
    return logits


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probabilities of what is left to draw from, by sorting; ties with the last that is kept are kept."""
    weights = np.exp((logits.astype(float) - logits.max()) / params.temperature)
    falling = np.sort(logits)[::-1]
    if 0 < params.top_k < len(logits):
        weights[logits < falling[params.top_k - 1]] = 0
    if params.top_p < 1:
        order = np.argsort(-logits, kind="stable")
        reached = np.cumsum(weights[order]) >= params.top_p * weights.sum()
        weights[logits < falling[np.argmax(reached)]] = 0
    weights[weights < np.float32(params.min_p)] = 0
    return weights / weights.sum()


def expected(logits: np.ndarray, flags: StepFlags, output: Sequence[int]) -> int:
    logits = changed(logits, flags, output)
    if flags.params.temperature == 0:
        return int(np.argmax(logits))
    return int(np.searchsorted(np.cumsum(kept(logits, flags.params)), uniform(flags.seed, len(output)), side="right"))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(float) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


VOCAB = 50
TOKENS = st.integers(0, VOCAB - 1)
ASKED = st.builds(
    StepFlags,
    params=st.builds(
        SamplingParams,
        max_tokens=st.just(100),
        min_tokens=st.integers(0, 6),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        top_k=st.sampled_from([0, 1, 3, 20, 49, 50, 2**40]),
        top_p=st.sampled_from([0.02, 0.31, 0.77, 0.97, 1.0]),
        min_p=st.sampled_from([0.0, 0.013, 0.21, 1.0]),
        repetition_penalty=st.sampled_from([0.8, 1.0, 1.7]),
        presence_penalty=st.sampled_from([-2.0, 0.0, 0.9]),
        frequency_penalty=st.sampled_from([-0.4, 0.0, 0.6]),
        logit_bias=st.none() | st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 3.0, 100.0]), max_size=6),
    ),
    seed=st.integers(0, 2**32 - 1),
    prompt=st.lists(TOKENS, min_size=1, max_size=12),
    stop_ids=st.frozensets(TOKENS, max_size=16),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(ASKED, st.lists(TOKENS, max_size=12)), min_size=8, max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_every_parameter_on_every_number_of_devices(emitted: list[tuple[StepFlags, list[int]]], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=(len(emitted), VOCAB)).astype(np.float32)
    requests, outputs = zip(*emitted, strict=True)
    tokens = [expected(row, request, output) for row, request, output in zip(logits, requests, outputs, strict=True)]
    for heads in PLACES:
        sampled = run(heads, logits, requests, outputs, top=TOP)
        np.testing.assert_array_equal(sampled.tokens, tokens)
        every = log_softmax(logits)
        np.testing.assert_allclose(sampled.logprobs, every[np.arange(len(emitted)), tokens], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(sampled.top_tokens, np.argsort(-logits, kind="stable")[:, :TOP])
        np.testing.assert_allclose(
            sampled.top_logprobs, np.take_along_axis(every, np.asarray(sampled.top_tokens), 1), rtol=1e-5, atol=1e-5
        )


def frequencies(params: SamplingParams) -> np.ndarray:
    """How often each token is drawn by as many requests, of different seeds."""
    logits = np.broadcast_to(np.log(PROBABILITIES[[3, 0, 4, 1, 2]]), (DRAWS, 5))
    counts = Counter(run(2, logits, [StepFlags(params, seed) for seed in range(DRAWS)]).tokens.tolist())
    return np.array([counts[token] for token in (1, 3, 4, 0, 2)]) / DRAWS


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), PROBABILITIES),
        (SamplingParams(temperature=0), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=1e-45), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=1e-6), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=3e38), [0.2] * 5),
        (SamplingParams(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_k=1), [1, 0, 0, 0, 0]),
        (SamplingParams(top_p=0.69), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.4), [1, 0, 0, 0, 0]),
        (SamplingParams(top_p=1e-300), [1, 0, 0, 0, 0]),
        (SamplingParams(min_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(min_p=1), [1, 0, 0, 0, 0]),
        # top_p is of what top_k left: 0.4/0.85 and 0.3/0.85 reach 0.8, 0.4 and 0.3 alone would not.
        (SamplingParams(top_k=3, top_p=0.8), [4 / 7, 3 / 7, 0, 0, 0]),
        # min_p is of the likeliest, and what it cuts off still counts for top_p.
        (SamplingParams(top_p=0.8, min_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_frequencies(params: SamplingParams, expected: list[float]) -> None:
    np.testing.assert_allclose(frequencies(params), expected, atol=4 * 0.5 / np.sqrt(DRAWS))


def test_a_draw_depends_on_its_own_seed_and_step_only() -> None:
    logits = np.random.default_rng(0).normal(size=(6, VOCAB))
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9)
    requests, steps = [StepFlags(params, seed) for seed in (7, 7, 8, 9, 10, 11)], [0, 1, 0, 0, 0, 0]
    together = run(2, logits, requests, generated=steps).tokens
    backwards = run(2, logits[::-1], requests[::-1], generated=steps[::-1]).tokens
    np.testing.assert_array_equal(together, backwards[::-1])
    emitted = run(
        1, np.broadcast_to(logits[0], (300, VOCAB)), [StepFlags(SamplingParams(), 7)] * 300, generated=range(300)
    )
    assert len(set(emitted.tokens.tolist())) > 10


@HEADS
def test_greedy_neighbours_stay_greedy(heads: int) -> None:
    logits = np.random.default_rng(1).normal(size=(4, VOCAB))
    hot, cold = SamplingParams(temperature=5.0), SamplingParams(temperature=0.0)
    sampled = run(heads, logits, [StepFlags(cold), StepFlags(hot, 1), None, StepFlags(hot, 3)])
    np.testing.assert_array_equal(sampled.tokens[::2], logits.argmax(axis=-1)[::2])
    np.testing.assert_array_equal(run(heads, logits).tokens, logits.argmax(axis=-1))


@HEADS
def test_of_equals_the_lowest_token_is_the_likeliest(heads: int) -> None:
    logits = np.zeros((4, 23))
    logits[1, 7:] = 1
    logits[2, [9, 22]] = 100
    logits[3] = -np.inf
    logits[3, [21, 22]] = -100
    sampled = run(heads, logits, top=TOP)
    assert sampled.tokens.tolist() == [0, 7, 9, 21]
    assert sampled.top_tokens.tolist() == [[0, 1, 2], [7, 8, 9], [9, 22, 0], [21, 22, NOWHERE]]
    np.testing.assert_allclose(sampled.logprobs, -np.log([23, 16 + 7 / np.e, 2, 2]), rtol=1e-4)


@HEADS
@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.5)])
def test_equals_of_the_last_that_is_kept_are_kept(heads: int, params: SamplingParams) -> None:
    logits = np.full((200, 23), -50.0)
    logits[:, 4], logits[:, [1, 8, 22]] = 1.0, 0.5
    logits[:, 11] = np.nextafter(np.float32(0.5), np.float32(0))
    emitted = run(heads, logits, [StepFlags(params, seed) for seed in range(200)]).tokens
    assert set(emitted.tolist()) == {1, 4, 8, 22}


def test_candidates_beyond_the_vocabulary_are_nowhere() -> None:
    sampled = run(4, np.log(PROBABILITIES)[None], top=20)
    assert sampled.top_tokens[0].tolist() == [0, 1, 2, 3, 4] + [NOWHERE] * 15
    np.testing.assert_allclose(sampled.top_logprobs[0, :5], np.log(PROBABILITIES), rtol=1e-5)
    assert np.all(np.isneginf(sampled.top_logprobs[0, 5:]))


@HEADS
def test_a_token_of_no_mass_is_never_drawn(heads: int) -> None:
    """Whatever is last, and however the sums of 100 000 small numbers are rounded."""
    logits = np.full((256, 100_000), -np.inf)
    logits[:, 1:-1:3] = 0
    tokens = run(heads, logits, [StepFlags(SamplingParams(), seed) for seed in range(256)]).tokens
    assert np.all(tokens % 3 == 1)
    assert len(set((tokens // 10_000).tolist())) == 10


def test_however_sums_are_rounded_a_mass_is_found() -> None:
    masses = jnp.broadcast_to(jnp.array([0.0, 0.125, 0.0, 0.25, 0.0]), (6, 5))
    which, rest = _fall(masses, jnp.array([0.0, 0.1, 0.125, 0.3, 0.375, 1.0]))
    assert which.tolist() == [1, 1, 3, 3, 3, 3]
    np.testing.assert_allclose(rest, [0, 0.1, 0, 0.175, 0.25, 0.875], rtol=1e-6)


@HEADS
def test_rows_of_no_number_give_some_token_and_leave_the_others_alone(heads: int) -> None:
    logits = np.random.default_rng(2).normal(size=(4, VOCAB))
    requests = [StepFlags(SamplingParams(top_k=5, top_p=0.9, min_p=0.1), seed) for seed in range(4)]
    good = run(heads, logits, requests)
    logits[0], logits[2] = np.nan, -np.inf
    bad = run(heads, logits, requests)
    np.testing.assert_array_equal(bad.tokens[1::2], good.tokens[1::2])
    np.testing.assert_array_equal(bad.logprobs[1::2], good.logprobs[1::2])
    assert np.all((bad.tokens >= 0) & (bad.tokens < VOCAB))
    assert np.all(np.isnan(bad.logprobs[::2]))


@HEADS
def test_logprobs_of_given_tokens(heads: int) -> None:
    here = Placement.parse(PLACES[heads])
    logits = np.random.default_rng(3).normal(size=(6, VOCAB)).astype(np.float32)
    tokens = np.array([0, 49, 25, 13, 12, 1], np.int32)
    rows, both = here.spec((Role.TOKENS,), (0,)), here.spec((Role.TOKENS, Role.HEADS), (0, 0))

    def scored(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        return logprobs_of(logits, tokens, VOCAB, here, top=TOP)

    mapped = jax.jit(jax.shard_map(scored, mesh=here.mesh, in_specs=(both, rows), out_specs=rows))
    found = mapped(padded(logits, heads), tokens)
    every = log_softmax(logits)
    np.testing.assert_allclose(found.logprobs, every[np.arange(6), tokens], rtol=1e-5)
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-logits)[:, :TOP])
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-every)[:, :TOP], rtol=1e-5)


@pytest.mark.usefixtures("fresh_compilation")
def test_no_row_of_the_vocabulary_is_sent() -> None:
    heads, vocab, requests = 4, 32_768, 2
    args = (jnp.zeros((requests, vocab)), SamplingMetadata.of([None] * requests), np.zeros(requests, np.int32))
    history = np.zeros((requests, 24), np.int32)
    found = collectives(program(heads, vocab, 20).lower(*args, history).compile().as_text() or "")
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    assert all(c.devices == heads for c in found)
    # Each of the 2 x 16 passes of the two bisections sums 3 numbers of a request; the rest is candidates.
    passes = 2 * 16 * 2 * 3 * 4 * requests * 3 / 4
    candidates = 2 * 20 * heads * 4 * requests * 3 / 4
    assert passes + candidates < sent_bytes(found) < 1.1 * (passes + candidates)
    assert sent_bytes(found) < vocab / heads * 4 / 2
