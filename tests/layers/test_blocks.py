"""Feed-forward blocks with every combine and any counts, on some placements; `test_every_placement` has the others."""

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
from placements import placement
from reference import dense, moe

from moe_jax.config import DenseConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_jax.layers import DenseMLP, MoE
from moe_jax.sharding import (
    AllToAllCombine,
    Combine,
    Placement,
    RaggedCombine,
    ReduceCombine,
    Role,
    Rows,
    ScatterCombine,
)

HIDDEN, CAPACITY = 16, 4
# 24 experts and units of width divide over the sizes of every placement, six devices included.
ROUTED = MoEConfig(experts=24, top_k=3, width=24, router=RouterConfig(norm=1))
SHARED = MoEConfig(experts=24, top_k=2, width=24, router=RouterConfig(), shared=SharedExpertConfig(48, gated=True))
DENSE = DenseConfig(width=48)
F32 = {"dtype": jnp.float32}

KINDS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], Callable[..., jax.Array]]] = {
    "moe": (lambda rngs: MoE(ROUTED, HIDDEN, **F32, rngs=rngs), lambda x, w: moe(x, w, ROUTED)),
    "shared": (lambda rngs: MoE(SHARED, HIDDEN, **F32, rngs=rngs), lambda x, w: moe(x, w, SHARED)),
    "dense": (lambda rngs: DenseMLP(DENSE, HIDDEN, **F32, rngs=rngs), dense),
}
COMBINES = (ScatterCombine, ReduceCombine, RaggedCombine, AllToAllCombine)


@cache
def block(kind: str, where: str) -> Block:
    return Block(KINDS[kind][0], placement(where))


@cache
def program(kind: str, where: str, combine: type[Combine]) -> Callable[..., jax.Array]:
    layer = block(kind, where)
    return jax.jit(layer.program(for_any_counts(combine, layer.placement)))


def for_any_counts(combine: type[Combine], placement: Placement) -> Combine:
    """Make a combine of one static size for all counts, so that each program is compiled once."""
    all_rows = CAPACITY * placement.gather_shards
    if combine is RaggedCombine:
        return RaggedCombine(placement, base=1, overflow=all_rows)
    return combine.sized(placement, [CAPACITY] * placement.size(Role.TOKENS), CAPACITY)


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, HIDDEN)).astype(np.float32)


def run(kind: str, where: str, combine: type[Combine], counts: list[int], x: np.ndarray, fill: float) -> np.ndarray:
    layer = block(kind, where)
    padded = spread(x, counts, CAPACITY, fill)
    rows = Rows.of(counts, layer.placement, CAPACITY)
    return np.asarray(program(kind, where, combine)(layer.parameters, padded, rows))


def counts_like(shards: int, shape: str) -> list[int]:
    return {
        "equal": [CAPACITY] * shards,
        "idle": [0] * shards,
        "one_heavy": [CAPACITY] + [1] * (shards - 1),
        "one_idle": [0] + [CAPACITY - 1] * (shards - 1),
        "last_only": [0] * (shards - 1) + [CAPACITY],
    }[shape]


@pytest.mark.parametrize("where", ["single", "dp8_ep8", "two_replicas_dp4_ep4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_combine_equals_the_unsharded_reference(kind: str, where: str) -> None:
    layer = block(kind, where)
    for shape in ("equal", "idle", "one_heavy", "one_idle", "last_only"):
        counts = counts_like(layer.shards, shape)
        x = random_rows(sum(counts))
        expected = np.asarray(KINDS[kind][1](x, layer.weights))
        for combine in COMBINES:
            got = collect(run(kind, where, combine, counts, x, fill=0.0), counts, CAPACITY)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max(initial=1))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("where", ["dp8_ep8", "dp4_ep4_tp2", "two_replicas_dp4_ep4"])
def test_any_counts(where: str, data: st.DataObject) -> None:
    layer = block("shared", where)
    counts = data.draw(st.lists(st.integers(0, CAPACITY), min_size=layer.shards, max_size=layer.shards))
    x = random_rows(sum(counts), seed=data.draw(st.integers(0, 99)))
    expected = np.asarray(moe(jnp.asarray(x), layer.weights, SHARED))
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


@pytest.mark.parametrize("combine", COMBINES)
def test_full_rows_change_no_bit(combine: type[Combine]) -> None:
    layer = block("shared", "dp8_ep8")
    counts = [CAPACITY] * layer.shards
    x = random_rows(sum(counts))
    got = program("shared", "dp8_ep8", combine)(layer.parameters, x, Rows.full(CAPACITY))
    np.testing.assert_array_equal(got, run("shared", "dp8_ep8", combine, counts, x, fill=0.0))


def test_full_rows_are_not_masked() -> None:
    layer = block("shared", "dp8_ep8")
    run_block = layer.program(for_any_counts(ScatterCombine, layer.placement))
    x = random_rows(CAPACITY * layer.shards)
    full, masked = (
        str(jax.make_jaxpr(run_block)(layer.parameters, x, rows)).count("select_n")
        for rows in (Rows.full(CAPACITY), Rows.of([CAPACITY] * layer.shards, layer.placement))
    )
    # Masks of the selected experts, of their scores, and of the partial sums of the routed and the shared experts.
    assert masked - full == 4
