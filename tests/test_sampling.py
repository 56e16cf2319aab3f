from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.sampling import Knobs, sample

PROBABILITIES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
DRAWS = 4000
sample_jit = jax.jit(sample)


def frequencies(params: SamplingParams) -> np.ndarray:
    """How often each token is drawn by as many requests, of different seeds."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES[[3, 0, 4, 1, 2]])), (DRAWS, 5))
    tokens = sample_jit(logits, Knobs.of([(params, seed, 0) for seed in range(DRAWS)])).tokens
    counts = Counter(np.asarray(tokens).tolist())
    return np.array([counts[token] for token in (1, 3, 4, 0, 2)]) / DRAWS


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), PROBABILITIES),
        (SamplingParams(temperature=0), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=0.5), PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        (SamplingParams(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_k=1), [1, 0, 0, 0, 0]),
        (SamplingParams(top_p=0.69), [4 / 7, 3 / 7, 0, 0, 0]),
        (SamplingParams(top_p=0.4), [1, 0, 0, 0, 0]),
        # top_p is of what top_k left: 0.4/0.85 and 0.3/0.85 reach 0.8, 0.4 and 0.3 alone would not.
        (SamplingParams(top_k=3, top_p=0.8), [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_frequencies(params: SamplingParams, expected: list[float]) -> None:
    np.testing.assert_allclose(frequencies(params), expected, atol=4 * 0.5 / np.sqrt(DRAWS))


def test_a_draw_depends_on_its_own_seed_and_step_only() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32))
    params = SamplingParams(temperature=1.3, top_k=20, top_p=0.9)
    requests = [(params, seed, step) for seed, step in [(7, 0), (7, 1), (8, 0), (9, 0), (10, 0), (11, 0)]]
    together = sample_jit(logits, Knobs.of(requests)).tokens
    backwards = sample_jit(logits[::-1], Knobs.of(requests[::-1])).tokens
    np.testing.assert_array_equal(together, backwards[::-1])
    one_row = jnp.broadcast_to(logits[0], (300, 50))
    drawn = sample_jit(one_row, Knobs.of([(SamplingParams(), 7, step) for step in range(300)])).tokens
    assert len(set(np.asarray(drawn).tolist())) > 10


def test_greedy_neighbours_stay_greedy() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32))
    hot, cold = SamplingParams(temperature=5.0), SamplingParams(temperature=0.0)
    sampled = sample_jit(logits, Knobs.of([(cold, 0, 0), (hot, 1, 0), (cold, 2, 0), (hot, 3, 0)]))
    np.testing.assert_array_equal(sampled.tokens[::2], jnp.argmax(logits, axis=-1)[::2])
    expected = jax.nn.log_softmax(logits)[jnp.arange(4), sampled.tokens]
    np.testing.assert_allclose(sampled.logprobs, expected, rtol=1e-5)


def test_a_top_k_beyond_any_vocabulary_keeps_all() -> None:
    logits = jnp.log(jnp.asarray(PROBABILITIES))[None]
    drawn = [
        sample_jit(logits, Knobs.of([(SamplingParams(top_k=top_k), seed, 0)])).tokens.tolist()
        for top_k in (0, 2**40)
        for seed in range(8)
    ]
    assert drawn[:8] == drawn[8:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens must be 0 or more, got -1"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be positive"),
        ({"seed": -1}, "seed must be from 0"),
        ({"max_tokens": 4.0}, "max_tokens must be a whole number, got 4.0"),
        ({"stop_token_ids": ("2",)}, "stop_token_ids must be token ids"),
    ],
)
def test_parameters_out_of_range(fields: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]
