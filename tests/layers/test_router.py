"""Routers: the experts of each row, their weights, and the load."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import GroupLimit, GroupScore, MoEConfig, RouterConfig, Score, SparseMixerConfig
from moe_jax.kernels.routing import SparseMixer, TopKRouting
from moe_jax.layers.router import Router, Routing

EXPERTS, HIDDEN, ROWS = 6, 8, 5
VALID = jnp.array([True, True, False, True, False])


def route(norm: float | None = 1, fill: float = 0.0, dtype: str = "float32") -> tuple[jax.Array, jax.Array, Routing]:
    router = Router(MoEConfig(EXPERTS, 2, 4, RouterConfig(norm=norm)), HIDDEN, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (ROWS, HIDDEN)).astype(dtype)
    x = jnp.where(VALID[:, None], x, fill)
    return x, router.weight[...], jax.jit(lambda: router(x, VALID))()


@pytest.mark.parametrize("norm", [1, None])
def test_top_k_selects_the_experts_of_the_highest_softmax_scores(norm: float | None) -> None:
    x, weight, routing = route(norm)
    scores = jax.nn.softmax(x @ weight)
    for row in np.flatnonzero(VALID):
        best = np.argsort(-scores[row])[:2]
        assert routing.experts[row].tolist() == best.tolist()
        expected = scores[row][best] / (scores[row][best].sum() if norm else 1)
        np.testing.assert_allclose(routing.weights[row], expected, rtol=1e-5)


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_pad_rows_visit_no_expert_and_add_no_load(fill: float) -> None:
    x, weight, routing = route(fill=fill)
    assert (routing.experts[~VALID] == EXPERTS).all()
    assert routing.experts[VALID].max() < EXPERTS
    np.testing.assert_array_equal(
        routing.load.assignments, np.bincount(np.asarray(routing.experts[VALID]).ravel(), minlength=EXPERTS)
    )
    expected = jax.nn.softmax(x[VALID] @ weight).sum(axis=0)
    np.testing.assert_allclose(routing.load.probabilities, expected, rtol=1e-5)


def test_scores_are_float32_for_rows_of_any_dtype() -> None:
    x, weight, routing = route(norm=None, dtype="bfloat16")
    scores = jax.nn.softmax(x.astype(jnp.float32) @ weight)
    assert routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights[VALID, 0], scores[VALID].max(axis=-1), rtol=1e-6)


def test_a_selection_bias_and_groups_select_experts_but_do_not_weigh_them() -> None:
    limit = GroupLimit(groups=3, kept=2, score=GroupScore.BEST_TWO)
    config = RouterConfig(Score.SIGMOID, selection_bias=True, limit=limit, norm=2, scale=1.5)
    logits = jnp.array([[2.0, -1.0, 1.5, 1.4, 3.0, -9.0]])
    bias = jnp.array([-0.8, 0.0, 0.0, 0.0, 0.0, 0.0])
    selected = TopKRouting(config, 2)(logits, bias)
    # Biased scores of the groups: (0.08, 0.27), (0.82, 0.80), (0.95, 0.00).
    assert selected.experts.tolist() == [[4, 2]]
    scores = 1 / (1 + np.exp([-3.0, -1.5]))
    np.testing.assert_allclose(selected.weights[0], 1.5 * scores / np.sqrt((scores**2).sum()), rtol=1e-6)


def test_high_logits_whose_sigmoids_round_to_one_are_distinguished() -> None:
    selected = TopKRouting(RouterConfig(Score.SIGMOID), 1)(jnp.array([[30.0, 29.0, 31.0]]), None)
    assert selected.experts.tolist() == [[2]]
    assert selected.weights.tolist() == [[1.0]]


def test_groups_can_be_ranked_by_their_best_score() -> None:
    limit = GroupLimit(groups=2, kept=1, score=GroupScore.BEST)
    selected = TopKRouting(RouterConfig(limit=limit), 2)(jnp.array([[3.0, 0.0, 2.9, 2.8]]), None)
    assert selected.experts.tolist() == [[0, 1]]


def test_sparse_mixer_weighs_each_expert_against_its_near_rivals() -> None:
    selected = SparseMixer(SparseMixerConfig(tolerance=0.2), 2)(jnp.array([[4.0, 3.5, 3.3, 1.0]]), None)
    assert selected.experts.tolist() == [[0, 1]]
    near = np.exp([4.0, 3.5, 3.3])
    np.testing.assert_allclose(selected.weights[0], [near[0] / near.sum(), near[1] / near[1:].sum()], rtol=1e-6)
