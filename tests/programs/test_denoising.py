"""Choice of the tokens of a block that a step unmasks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.programs.denoising import confident, max_emitted

NAN = float("nan")


@pytest.mark.parametrize(
    ("probabilities", "masked", "threshold", "quota", "expected"),
    [
        ([0.5, 0.9, 0.8, 0.1], [1, 1, 1, 1], 0.7, 1, [0, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [1, 1, 1, 1], 0.7, 3, [1, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [1, 0, 0, 1], 0.7, 1, [1, 0, 0, 0]),  # unmasked positions do not count
        ([0.3, 0.3, 0.3, 0.3], [0, 1, 1, 1], 1.0, 2, [0, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [1, 0, 0, 1], 1.0, 4, [1, 0, 0, 1]),
        ([1.0, 1.0, 0.8, 0.1], [1, 1, 1, 1], 1.0, 1, [1, 0, 0, 0]),  # equal to the threshold is not above it
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1], 0.5, 2, [1, 1, 0, 0]),
        ([NAN, NAN, NAN, NAN], [1, 1, 1, 0], 0.5, 1, [1, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [0, 0, 0, 0], 0.5, 1, [0, 0, 0, 0]),
    ],
)
def test_the_most_confident_tokens_are_unmasked(
    probabilities: list[float], masked: list[int], threshold: float, quota: int, expected: list[int]
) -> None:
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([probabilities], np.float32))
    chosen = confident(jnp.array(logprobs), jnp.array([masked], bool), jnp.array([threshold]), jnp.array([quota]))
    assert np.array(chosen)[0].astype(int).tolist() == expected


@pytest.mark.parametrize(("steps", "blocks"), [(1, 1), (2, 2), (3, 2), (8, 5)])
def test_max_emitted_bounds_the_tokens_of_a_dispatch(steps: int, blocks: int) -> None:
    """At most every second step completes a block, from the first step on."""
    assert max_emitted(4, steps) == 4 * blocks >= 4 * -(-steps // 2)
