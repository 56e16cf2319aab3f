"""Every way to give roles to axes: routed and shared experts and dense blocks, forward and gradient, against plain JAX
on one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import Block, by_name, collect, spread
from flax import nnx
from placements import legal
from reference import Weights, dense, moe

from moe_jax.config import DenseConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_jax.layers import DenseMLP, MoE
from moe_jax.sharding import AllToAllCombine, Combine, Placement, Role, Rows
from moe_jax.sharding.policy import STRATEGIES

HIDDEN, CAPACITY = 8, 3
# 24 experts and widths divide over 6 and 8 devices.
SHARED = MoEConfig(
    experts=24, top_k=2, width=24, router=RouterConfig(norm=1), shared=SharedExpertConfig(24, gated=True)
)
ROUTED = replace(SHARED, shared=None)
EVERY = [*legal(6), *(placement for placement in legal(8) if min(placement.mesh.axis_sizes) > 1)]
"""One axis, or two, of which one is no power of two; and three. Any other placement has the roles of one of these."""


class Layers(nnx.Module):
    """An MoE with a shared expert or without, and a dense block."""

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs) -> None:
        self.moe = MoE(config, HIDDEN, dtype=jnp.float32, rngs=rngs)
        self.dense = DenseMLP(DenseConfig(24), HIDDEN, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, rows: Rows, combine: Combine) -> tuple[jax.Array, None]:
        return self.moe(x, rows, combine)[0] + self.dense(x, rows, combine)[0], None


MAKE = {config: partial(Layers, config) for config in (SHARED, ROUTED)}


def plain(config: MoEConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    parts = (
        {name[len(part) :]: w for name, w in weights.items() if name.startswith(part)} for part in ("moe.", "dense.")
    )
    of_moe, of_dense = parts
    y = moe(x, of_moe, config) + dense(x, of_dense)
    return jnp.sum(y**2), y


@cache
def expected(config: MoEConfig, rows: int) -> dict[str, np.ndarray]:
    """The output and the gradients of `rows` rows."""
    weights = Block(MAKE[config], Placement.parse("data=1")).weights
    run = jax.jit(jax.value_and_grad(partial(plain, config), argnums=(0, 1), has_aux=True))
    (_, y), (of_weights, of_x) = run(weights, drawn(rows))
    return {"output": np.asarray(y), "rows": np.asarray(of_x)} | jax.tree.map(np.asarray, of_weights)


def drawn(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, HIDDEN)).astype(np.float32)


def test_there_are_as_many_as_there_should_be() -> None:
    """An axis plays one of 2 x 3 pairs of roles: one axis, two that differ in size, two or three that do not."""
    assert [len(legal(devices)) for devices in (8, 6, 4)] == [6 + 36 + 56, 6 + 36, 6 + 21]
    assert len(EVERY) == 6 + 36 + 56


@pytest.mark.parametrize("number", range(len(EVERY)))
def test_blocks_and_gradients_equal_those_of_one_device(number: int) -> None:
    placement = EVERY[number]
    shards = placement.size(Role.TOKENS)
    counts = [CAPACITY] + [(shard * 2) % (CAPACITY + 1) for shard in range(1, shards)]
    strategy = list(STRATEGIES.values())[number % len(STRATEGIES)].sized(placement, counts, CAPACITY)
    config = ROUTED if isinstance(strategy, AllToAllCombine) else SHARED
    made, rows = Block(MAKE[config], placement), Rows.of(counts, placement, CAPACITY)
    program = made.program(strategy)

    def objective(parameters: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = program(parameters, x, rows)
        return jnp.sum(y**2), y

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    x = spread(drawn(sum(counts)), counts, CAPACITY)
    (_, y), (of_parameters, of_x) = run(made.parameters, x)
    got = by_name(of_parameters) | {"output": collect(y, counts, CAPACITY), "rows": collect(of_x, counts, CAPACITY)}
    for name, value in expected(config, sum(counts)).items():
        message = f"{name} on {placement} by {strategy}"
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2e-5 * np.abs(value).max(), err_msg=message)
