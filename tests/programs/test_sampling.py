"""Sampling gives the tokens of the NumPy reference on any number of vocabulary shards."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import PLACEMENTS, POSITIONS, FakeRequest, expected_token, log_softmax, padded, program, run

from moe_jax import SamplingParams
from moe_jax.analysis.census import collectives, sent_bytes
from moe_jax.programs.sampling import NO_TOKEN, SamplingMetadata, TokenLogprobs, logprobs_of
from moe_jax.programs.sampling.drawing import inverse_cdf
from moe_jax.sharding import Placement, Role

SHARDS = pytest.mark.parametrize("shards", PLACEMENTS)
TOP = 3
PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
DRAWS = 4000
VOCAB = 50
TOKENS = st.integers(0, VOCAB - 1)
REQUESTS = st.builds(
    FakeRequest,
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
    st.lists(st.tuples(REQUESTS, st.lists(TOKENS, max_size=12)), min_size=8, max_size=8),
    st.integers(0, 2**32 - 1),
)
def test_every_parameter_on_every_number_of_shards(cases: list[tuple[FakeRequest, list[int]]], seed: int) -> None:
    logits = np.random.default_rng(seed).normal(scale=3, size=(len(cases), VOCAB)).astype(np.float32)
    requests, outputs = zip(*cases, strict=True)
    tokens = [expected_token(*case) for case in zip(logits, requests, outputs, strict=True)]
    for shards in PLACEMENTS:
        sampled = run(shards, logits, requests, outputs, top=TOP)
        np.testing.assert_array_equal(sampled.tokens, tokens)
        every = log_softmax(logits)
        np.testing.assert_allclose(sampled.logprobs, every[np.arange(len(cases)), tokens], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(sampled.top_tokens, np.argsort(-logits, kind="stable")[:, :TOP])
        np.testing.assert_allclose(
            sampled.top_logprobs, np.take_along_axis(every, np.asarray(sampled.top_tokens), 1), rtol=1e-5, atol=1e-5
        )


def frequencies(params: SamplingParams) -> np.ndarray:
    """Relative frequency of each token in `DRAWS` requests with different seeds."""
    logits = np.broadcast_to(np.log(PROBABILITIES[[3, 0, 4, 1, 2]]), (DRAWS, 5))
    counts = Counter(run(2, logits, [FakeRequest(params, seed) for seed in range(DRAWS)]).tokens.tolist())
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
        # top_p applies to the tokens that top_k keeps: 0.4/0.85 + 0.3/0.85 reaches 0.8, 0.4 + 0.3 would not.
        (SamplingParams(top_k=3, top_p=0.8), [4 / 7, 3 / 7, 0, 0, 0]),
        # min_p is relative to the most likely token, and the tokens it cuts off still count for top_p.
        (SamplingParams(top_p=0.8, min_p=0.7), [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_frequencies(params: SamplingParams, expected: list[float]) -> None:
    np.testing.assert_allclose(frequencies(params), expected, atol=4 * 0.5 / np.sqrt(DRAWS))


def test_a_draw_depends_only_on_its_seed_and_step() -> None:
    logits = np.random.default_rng(0).normal(size=(6, VOCAB))
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9)
    requests, steps = [FakeRequest(params, seed) for seed in (7, 7, 8, 9, 10, 11)], [0, 1, 0, 0, 0, 0]
    forwards = run(2, logits, requests, generated=steps).tokens
    backwards = run(2, logits[::-1], requests[::-1], generated=steps[::-1]).tokens
    np.testing.assert_array_equal(forwards, backwards[::-1])
    same_seed = [FakeRequest(SamplingParams(), 7)] * 300
    drawn = run(1, np.broadcast_to(logits[0], (300, VOCAB)), same_seed, generated=range(300)).tokens
    assert len(set(drawn.tolist())) > 10


@SHARDS
def test_greedy_requests_stay_greedy_beside_random_ones(shards: int) -> None:
    logits = np.random.default_rng(1).normal(size=(4, VOCAB))
    random, greedy = SamplingParams(temperature=5.0), SamplingParams(temperature=0.0)
    sampled = run(shards, logits, [FakeRequest(greedy), FakeRequest(random, 1), None, FakeRequest(random, 3)])
    np.testing.assert_array_equal(sampled.tokens[::2], logits.argmax(axis=-1)[::2])
    np.testing.assert_array_equal(run(shards, logits).tokens, logits.argmax(axis=-1))


@SHARDS
def test_the_lowest_token_wins_a_tie(shards: int) -> None:
    logits = np.zeros((4, 23))
    logits[1, 7:] = 1
    logits[2, [9, 22]] = 100
    logits[3] = -np.inf
    logits[3, [21, 22]] = -100
    sampled = run(shards, logits, top=TOP)
    assert sampled.tokens.tolist() == [0, 7, 9, 21]
    assert sampled.top_tokens.tolist() == [[0, 1, 2], [7, 8, 9], [9, 22, 0], [21, 22, NO_TOKEN]]
    np.testing.assert_allclose(sampled.logprobs, -np.log([23, 16 + 7 / np.e, 2, 2]), rtol=1e-4)


@SHARDS
@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.5)])
def test_tokens_equal_to_the_last_kept_one_are_kept(shards: int, params: SamplingParams) -> None:
    logits = np.full((200, 23), -50.0)
    logits[:, 4], logits[:, [1, 8, 22]] = 1.0, 0.5
    logits[:, 11] = np.nextafter(np.float32(0.5), np.float32(0))
    drawn = run(shards, logits, [FakeRequest(params, seed) for seed in range(200)]).tokens
    assert set(drawn.tolist()) == {1, 4, 8, 22}


def test_top_tokens_beyond_the_vocabulary_are_no_token() -> None:
    sampled = run(4, np.log(PROBABILITIES)[None], top=20)
    assert sampled.top_tokens[0].tolist() == [0, 1, 2, 3, 4] + [NO_TOKEN] * 15
    np.testing.assert_allclose(sampled.top_logprobs[0, :5], np.log(PROBABILITIES), rtol=1e-5)
    assert np.all(np.isneginf(sampled.top_logprobs[0, 5:]))


@SHARDS
def test_a_token_of_probability_zero_is_never_drawn(shards: int) -> None:
    """The last columns have probability 0, and sums of 100 000 small numbers are rounded."""
    logits = np.full((256, 100_000), -np.inf)
    logits[:, 1:-1:3] = 0
    tokens = run(shards, logits, [FakeRequest(SamplingParams(), seed) for seed in range(256)]).tokens
    assert np.all(tokens % 3 == 1)
    assert len(set((tokens // 10_000).tolist())) == 10


def test_the_inverse_cdf_never_selects_an_empty_mass() -> None:
    masses = jnp.broadcast_to(jnp.array([0.0, 0.125, 0.0, 0.25, 0.0]), (6, 5))
    index, rest = inverse_cdf(masses, jnp.array([0.0, 0.1, 0.125, 0.3, 0.375, 1.0]))
    assert index.tolist() == [1, 1, 3, 3, 3, 3]
    np.testing.assert_allclose(rest, [0, 0.1, 0, 0.175, 0.25, 0.875], rtol=1e-6)


@SHARDS
def test_rows_of_nan_give_a_valid_token_and_leave_other_rows_alone(shards: int) -> None:
    logits = np.random.default_rng(2).normal(size=(4, VOCAB))
    requests = [FakeRequest(SamplingParams(top_k=5, top_p=0.9, min_p=0.1), seed) for seed in range(4)]
    good = run(shards, logits, requests)
    logits[0], logits[2] = np.nan, -np.inf
    bad = run(shards, logits, requests)
    np.testing.assert_array_equal(bad.tokens[1::2], good.tokens[1::2])
    np.testing.assert_array_equal(bad.logprobs[1::2], good.logprobs[1::2])
    assert np.all((bad.tokens >= 0) & (bad.tokens < VOCAB))
    assert np.all(np.isnan(bad.logprobs[::2]))


@SHARDS
def test_logprobs_of_given_tokens(shards: int) -> None:
    placement = Placement.parse(PLACEMENTS[shards])
    logits = np.random.default_rng(3).normal(size=(6, VOCAB)).astype(np.float32)
    tokens = np.array([0, 49, 25, 13, 12, 1], np.int32)
    rows, both = placement.spec((Role.TOKENS,), (0,)), placement.spec((Role.TOKENS, Role.HEADS), (0, 0))

    def score(logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        return logprobs_of(logits, tokens, VOCAB, placement, top=TOP)

    mapped = jax.jit(jax.shard_map(score, mesh=placement.mesh, in_specs=(both, rows), out_specs=rows))
    found = mapped(padded(logits, shards), tokens)
    every = log_softmax(logits)
    np.testing.assert_allclose(found.logprobs, every[np.arange(6), tokens], rtol=1e-5)
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-logits)[:, :TOP])
    np.testing.assert_allclose(found.top_logprobs, -np.sort(-every)[:, :TOP], rtol=1e-5)


@pytest.mark.usefixtures("fresh_compilation")
def test_no_row_of_the_vocabulary_is_sent() -> None:
    shards, vocab, requests = 4, 32_768, 2
    args = (jnp.zeros((requests, vocab)), SamplingMetadata.of([None] * requests), np.zeros(requests, np.int32))
    history = np.zeros((requests, POSITIONS), np.int32)
    found = collectives(program(shards, vocab, 20).lower(*args, history).compile().as_text() or "")
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    assert all(c.devices == shards for c in found)
    # Each of the 2 x 16 passes of the two bisections sums 3 numbers per request; the rest is the top tokens.
    passes = 2 * 16 * 2 * 3 * 4 * requests * 3 / 4
    top_tokens = 2 * 20 * shards * 4 * requests * 3 / 4
    assert passes + top_tokens < sent_bytes(found) < 1.1 * (passes + top_tokens)
    assert sent_bytes(found) < vocab / shards * 4 / 2
