"""Routed and shared experts and dense blocks, with every assignment of roles to axes, against plain JAX on one device.

Some placements compare gradients too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import Block, by_name, collect, spread
from flax import nnx
from placements import all_placements
from reference import Weights, dense, moe

from moe_jax.config import DenseConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_jax.layers import DenseMLP, MoE
from moe_jax.sharding import AllToAllCombine, Combine, Placement, Role, Rows
from moe_jax.sharding.policy import STRATEGIES

HIDDEN, CAPACITY = 8, 3
# 24 experts and units of width divide over 6 and 8 devices.
SHARED = MoEConfig(
    experts=24, top_k=2, width=24, router=RouterConfig(norm=1), shared=SharedExpertConfig(24, gated=True)
)
ROUTED = replace(SHARED, shared=None)
EVERY = [*all_placements(6), *(placement for placement in all_placements(8) if min(placement.mesh.axis_sizes) > 1)]
"""Placements on one axis; on two, one of them no power of two; and on three. They cover the roles of all others."""
WITH_GRADIENTS = [*range(6), *range(6, len(EVERY), 7)]
"""Placements that compare gradients, which take four times as long to compile.

An axis has each of its pairs of roles alone, and with a larger axis, a smaller axis, and two axes.
"""


class Layers(nnx.Module):
    """An MoE, with or without a shared expert, and a dense block."""

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs) -> None:
        self.moe = MoE(config, HIDDEN, dtype=jnp.float32, rngs=rngs)
        self.dense = DenseMLP(DenseConfig(24), HIDDEN, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: jax.Array, rows: Rows, combine: Combine) -> tuple[jax.Array, None]:
        return self.moe(x, rows, combine)[0] + self.dense(x, rows, combine)[0], None


MAKE = {config: partial(Layers, config) for config in (SHARED, ROUTED)}


def plain(config: MoEConfig, weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    moe_weights, dense_weights = (
        {name[len(part) :]: w for name, w in weights.items() if name.startswith(part)} for part in ("moe.", "dense.")
    )
    y = moe(x, moe_weights, config) + dense(x, dense_weights)
    return jnp.sum(y**2), y


@cache
def expected(config: MoEConfig, rows: int) -> dict[str, np.ndarray]:
    """Output and gradients of `rows` rows in plain JAX on one device."""
    weights = Block(MAKE[config], Placement.parse("data=1")).weights
    run = jax.jit(jax.value_and_grad(partial(plain, config), argnums=(0, 1), has_aux=True))
    (_, y), (grad_weights, grad_x) = run(weights, random_rows(rows))
    return {"output": np.asarray(y), "rows": np.asarray(grad_x)} | jax.tree.map(np.asarray, grad_weights)


def random_rows(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, HIDDEN)).astype(np.float32)


def test_the_number_of_placements() -> None:
    """An axis has one of 2 x 3 pairs of roles; swapping axes of one size gives the same placement."""
    assert [len(all_placements(devices)) for devices in (8, 6, 4)] == [6 + 36 + 56, 6 + 36, 6 + 21]
    assert len(EVERY) == 6 + 36 + 56


class Case:
    """Rows spread unevenly over the token shards of a placement, combined by one of the strategies in rotation."""

    def __init__(self, number: int) -> None:
        self.placement = EVERY[number]
        others = range(1, self.placement.size(Role.TOKENS))
        self.counts = [CAPACITY, *(shard * 2 % (CAPACITY + 1) for shard in others)]
        strategy = list(STRATEGIES.values())[number % len(STRATEGIES)]
        self.strategy = strategy.sized(self.placement, self.counts, CAPACITY)
        self.config = ROUTED if strategy is AllToAllCombine else SHARED
        block, rows = Block(MAKE[self.config], self.placement), Rows.of(self.counts, self.placement, CAPACITY)
        program = block.program(self.strategy)
        self.run: Callable[[nnx.State, jax.Array], jax.Array] = lambda parameters, x: program(parameters, x, rows)
        self.inputs = block.parameters, spread(random_rows(sum(self.counts)), self.counts, CAPACITY)

    def collect(self, rows: jax.Array) -> np.ndarray:
        return collect(np.asarray(rows), self.counts, CAPACITY)

    def check(self, got: dict[str, np.ndarray]) -> None:
        wanted = expected(self.config, sum(self.counts))
        for name, value in got.items():
            message, largest = f"{name} on {self.placement} by {self.strategy}", np.abs(wanted[name]).max()
            np.testing.assert_allclose(value, wanted[name], rtol=0, atol=2e-5 * largest, err_msg=message)


@pytest.mark.usefixtures("no_cache_writes")
@pytest.mark.parametrize("number", sorted(set(range(len(EVERY))).difference(WITH_GRADIENTS)))
def test_blocks_equal_those_of_one_device(number: int) -> None:
    case = Case(number)
    case.check({"output": case.collect(jax.jit(case.run)(*case.inputs))})


@pytest.mark.usefixtures("no_cache_writes")
@pytest.mark.parametrize("number", WITH_GRADIENTS)
def test_blocks_and_gradients_equal_those_of_one_device(number: int) -> None:
    case = Case(number)

    def loss(parameters: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = case.run(parameters, x)
        return jnp.sum(y**2), y

    (_, y), (grad_parameters, grad_x) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*case.inputs)
    got = by_name(grad_parameters) | {"rows": case.collect(grad_x), "output": case.collect(y)}
    assert got.keys() == expected(case.config, sum(case.counts)).keys()
    case.check(got)
