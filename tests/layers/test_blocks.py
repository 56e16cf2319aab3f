"""Every feed-forward block, on every placement, with both combines and any counts, against plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import Block, collect, spread
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from placements import PLACEMENTS, placement
from reference import dense, moe

from moe_jax.config import DenseConfig, MoEConfig, SharedExpertConfig
from moe_jax.layers import DenseMLP, MoE
from moe_jax.sharding import Combine, ReduceCombine, Rows, ScatterCombine

HIDDEN, CAPACITY = 16, 4
# 24 experts and widths divide over every placement's sizes, six devices included.
ROUTED = MoEConfig(experts=24, top_k=3, width=24, renormalise=True)
SHARED = MoEConfig(experts=24, top_k=2, width=24, renormalise=False, shared=SharedExpertConfig(48, gated=True))
DENSE = DenseConfig(width=48)
F32 = {"dtype": jnp.float32}

KINDS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], Callable[..., np.ndarray]]] = {
    "moe": (lambda rngs: MoE(ROUTED, HIDDEN, **F32, rngs=rngs), lambda x, w: moe(x, w, ROUTED)),
    "shared": (lambda rngs: MoE(SHARED, HIDDEN, **F32, rngs=rngs), lambda x, w: moe(x, w, SHARED)),
    "dense": (lambda rngs: DenseMLP(DENSE, HIDDEN, **F32, rngs=rngs), dense),
}
COMBINES = (ScatterCombine, ReduceCombine)


@cache
def block(kind: str, where: str) -> Block:
    return Block(KINDS[kind][0], placement(where))


@cache
def program(kind: str, where: str, combine: type[Combine]) -> Callable[..., jax.Array]:
    made = block(kind, where)
    return jax.jit(made.program(combine(made.placement)))


def rows_of(made: Block, counts: list[int]) -> Rows:
    """Rows of one static size whatever the counts, so that each program is compiled once."""
    return Rows.of(counts, made.placement, CAPACITY, CAPACITY * made.placement.gather_shards)


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32)


def run(kind: str, where: str, combine: type[Combine], counts: list[int], x: np.ndarray, fill: float) -> np.ndarray:
    made = block(kind, where)
    laid_out = spread(x, counts, CAPACITY, fill)
    return np.asarray(program(kind, where, combine)(made.parameters, laid_out, rows_of(made, counts)))


def counts_like(shards: int, shape: str) -> list[int]:
    return {
        "equal": [CAPACITY] * shards,
        "idle": [0] * shards,
        "one_heavy": [CAPACITY] + [1] * (shards - 1),
        "one_idle": [0] + [CAPACITY - 1] * (shards - 1),
        "last_only": [0] * (shards - 1) + [CAPACITY],
    }[shape]


@pytest.mark.parametrize("where", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_combines_equal_the_unsharded_reference(kind: str, where: str) -> None:
    made = block(kind, where)
    for shape in ("equal", "idle", "one_heavy", "one_idle", "last_only"):
        counts = counts_like(made.shards, shape)
        x = random_rows(sum(counts))
        expected = KINDS[kind][1](x.astype(np.float64), made.weights) if len(x) else np.zeros((0, HIDDEN))
        for combine in COMBINES:
            got = collect(run(kind, where, combine, counts, x, fill=0.0), counts, CAPACITY)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(initial=1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("where", ["dp8_ep8", "dp4_ep4_tp2", "dp8_ep4_moe_tp2", "two_replicas_dp4_ep4"])
def test_any_counts(where: str, data: st.DataObject) -> None:
    made = block("shared", where)
    counts = data.draw(st.lists(st.integers(0, CAPACITY), min_size=made.shards, max_size=made.shards))
    x = random_rows(sum(counts), seed=data.draw(st.integers(0, 99)))
    expected = moe(x.astype(np.float64), made.weights, SHARED)
    for combine in COMBINES:
        got = collect(run("shared", where, combine, counts, x, fill=0.0), counts, CAPACITY)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(initial=1))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["dp8_ep8", "dp4_ep4_tp2", "dp2_ep4"])
def test_nan_in_pad_rows_changes_no_bit_and_pad_rows_come_out_zero(
    where: str, kind: str, combine: type[Combine]
) -> None:
    counts = counts_like(block(kind, where).shards, "one_heavy")
    x = random_rows(sum(counts))
    clean = run(kind, where, combine, counts, x, fill=0.0)
    for fill in (np.nan, np.inf):
        np.testing.assert_array_equal(run(kind, where, combine, counts, x, fill=fill), clean)
    real = spread(np.ones((sum(counts), 1), np.float32), counts, CAPACITY)[:, 0] > 0
    assert not clean[~real].any()
    assert clean[real].any(axis=1).all()


@pytest.mark.parametrize("where", ["dp4_ep4_tp2", "dp2_ep4", "dp8_ep4_moe_tp2", "two_replicas_dp4_ep4", "tp8_ep4"])
@pytest.mark.parametrize("kind", ["shared", "dense"])
def test_gradients_equal_those_of_one_device(kind: str, where: str) -> None:
    def gradients(where: str, combine: type[Combine], counts: list[int]) -> dict[str, np.ndarray]:
        made = block(kind, where)
        run_block, rows = made.program(combine(made.placement)), rows_of(made, counts)

        def objective(parameters: nnx.State, x: jax.Array) -> jax.Array:
            return jnp.sum(run_block(parameters, x, rows) ** 2)

        laid_out = spread(x, counts, CAPACITY)
        of_parameters, of_rows = jax.jit(jax.grad(objective, argnums=(0, 1)))(made.parameters, laid_out)
        flat = {str(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(of_parameters)}
        return flat | {"rows": collect(np.asarray(of_rows), counts, CAPACITY)}

    x = random_rows(CAPACITY)
    expected = gradients("single", ReduceCombine, [CAPACITY])
    shards = block(kind, where).shards
    counts = [CAPACITY] if shards == 1 else [CAPACITY // 2] * 2 + [0] * (shards - 2)
    for combine in COMBINES:
        got = gradients(where, combine, counts)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=name)
