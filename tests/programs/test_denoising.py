"""Which tokens of a block a step takes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.programs.denoising import confident, max_emitted

NAN, NONE = float("nan"), -float("inf")


@pytest.mark.parametrize(
    ("odds", "masked", "threshold", "least", "taken"),
    [
        ([0.5, 0.9, 0.8, 0.1], [1, 1, 1, 1], 0.7, 1, [0, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [1, 1, 1, 1], 0.7, 3, [1, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [1, 0, 0, 1], 0.7, 1, [1, 0, 0, 0]),  # what is chosen already counts for nothing
        ([0.3, 0.3, 0.3, 0.3], [0, 1, 1, 1], 1.0, 2, [0, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [1, 0, 0, 1], 1.0, 4, [1, 0, 0, 1]),
        ([1.0, 1.0, 0.8, 0.1], [1, 1, 1, 1], 1.0, 1, [1, 0, 0, 0]),  # as probable as the threshold is not more probable
        ([0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1], 0.5, 2, [1, 1, 0, 0]),
        ([NAN, NAN, NAN, NAN], [1, 1, 1, 0], 0.5, 1, [1, 1, 1, 0]),
        ([0.5, 0.9, 0.8, 0.1], [0, 0, 0, 0], 0.5, 1, [0, 0, 0, 0]),
    ],
)
def test_the_most_confident_tokens_are_taken(
    odds: list[float], masked: list[int], threshold: float, least: int, taken: list[int]
) -> None:
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([odds], np.float32))
    found = confident(jnp.array(logprobs), jnp.array([masked], bool), jnp.array([threshold]), jnp.array([least]))
    assert np.array(found)[0].astype(int).tolist() == taken


@pytest.mark.parametrize(("steps", "blocks"), [(1, 1), (2, 2), (3, 2), (8, 5)])
def test_no_more_tokens_come_than_there_is_room_for(steps: int, blocks: int) -> None:
    """A block that is chosen in one step, and written in the next, after one that was written in the first."""
    assert max_emitted(4, steps) == 4 * blocks >= 4 * -(-steps // 2)
