"""Sums over devices done twice, never or over the wrong axes are errors while tracing, with advice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from placements import placement

from moe_jax.config import DenseConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_jax.errors import PlacementError, ReductionError
from moe_jax.layers import DenseMLP, MoE, parameter
from moe_jax.sharding import (
    AllToAllCombine,
    Combine,
    Gathered,
    PartialSum,
    ReduceCombine,
    Rows,
    ScatterCombine,
    WholeResidual,
)
from moe_jax.sharding.collectives import all_gather, argsort, partial_sum, reduce, reduce_exchanged, sum_devices

HIDDEN, CAPACITY = 8, 2
SHARED = SharedExpertConfig(16, gated=True)
BLOCKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "moe": lambda rngs: MoE(MoEConfig(8, 2, 16, RouterConfig(norm=1)), HIDDEN, dtype=jnp.float32, rngs=rngs),
    "shared": lambda rngs: MoE(MoEConfig(8, 2, 16, RouterConfig(norm=1), SHARED), HIDDEN, dtype=jnp.float32, rngs=rngs),
    "dense": lambda rngs: DenseMLP(DenseConfig(16), HIDDEN, dtype=jnp.float32, rngs=rngs),
}
PLACEMENT = placement("dp4_ep4_tp2")
Body = Callable[[jax.Array, Rows, Combine, PartialSum, jax.Array], Any]
"""Function of own rows, their counts, the strategy, a block's partial sum, and its combined output."""


class SpyCombine(ScatterCombine):
    """Strategy that also returns the partial sum that a block passes to it."""

    def combine(self, gathered: Gathered, partial: PartialSum) -> Any:
        return partial, super().combine(gathered, partial)


def trace(kind: str, body: Body) -> None:
    """Trace a block and then `body`, on a placement that both scatters and sums."""
    graph, abstract = nnx.split(nnx.eval_shape(lambda: BLOCKS[kind](parameter.ShapesAlone(0))))
    parameters = parameter.placed(abstract, PLACEMENT)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, parameters)
    rows = Rows.of([CAPACITY] * 4, PLACEMENT)

    def run(parameters: nnx.State, x: jax.Array, rows: Rows) -> Any:
        spy = SpyCombine(PLACEMENT)
        (partial, combined), _ = nnx.merge(graph, parameters)(x, rows, spy)
        return body(x, rows, spy, partial, combined)

    x = jax.ShapeDtypeStruct((4 * CAPACITY, HIDDEN), jnp.float32)
    jax.eval_shape(
        jax.shard_map(run, mesh=PLACEMENT.mesh, in_specs=(specs, P("expert"), P()), out_specs=P("expert")),
        parameters,
        x,
        rows,
    )


BOTH = ("expert", "tensor")
MISTAKES: dict[str, tuple[Body, str]] = {
    "reduce_twice": (
        lambda x, rows, combine, partial, y: reduce(y, sum_over=BOTH),  # type: ignore[arg-type]
        "would multiply it by 8.*reduced already",
    ),
    "combine_twice": (
        lambda x, rows, combine, partial, y: ReduceCombine(PLACEMENT, 4 * CAPACITY).combine(combine.gather(rows, x), y),  # type: ignore[arg-type]
        "would multiply it by 8.*reduced already",
    ),
    "scatter_a_sum": (
        lambda x, rows, combine, partial, y: reduce(y, scatter_over=("expert",), sum_over=("tensor",)),  # type: ignore[arg-type]
        "would multiply it by 8.*reduced already",
    ),
    "declare_own_rows_partial_again": (
        lambda x, rows, combine, partial, y: combine.gather(rows, x).partial_sum(y),
        "has 8 rows, this has 2.*own rows that were combined need no further sum",
    ),
    "declare_a_partial_sum_partial": (
        lambda x, rows, combine, partial, y: partial_sum(partial, BOTH),  # type: ignore[arg-type]
        "is a partial sum already",
    ),
    "declare_a_whole_value_partial": (
        lambda x, rows, combine, partial, y: partial_sum(x, BOTH),
        "same on every device of .'tensor'.",
    ),
    "forget_to_reduce": (lambda x, rows, combine, partial, y: partial, "used as if it were the sum.*reduce it first"),
    "add_a_residual": (lambda x, rows, combine, partial, y: x + partial, "used as if it were the sum.*reduce it first"),
    "add_to_a_residual": (lambda x, rows, combine, partial, y: partial + x, "adding an array to a partial sum.*reduce"),
    "scale": (lambda x, rows, combine, partial, y: partial * 2.0, "used as if it were the sum"),  # type: ignore[operator]
    "activate": (lambda x, rows, combine, partial, y: jax.nn.gelu(partial), "used as if it were the sum"),  # type: ignore[arg-type]
    "multiply": (lambda x, rows, combine, partial, y: x.T @ partial, "used as if it were the sum"),  # type: ignore[operator]
    "norm": (lambda x, rows, combine, partial, y: jnp.mean(partial), "used as if it were the sum"),  # type: ignore[arg-type]
    "compare": (lambda x, rows, combine, partial, y: partial == y, "used as if it were the sum"),
    "branch": (lambda x, rows, combine, partial, y: bool(partial), "used as if it were the sum"),
    "gather": (lambda x, rows, combine, partial, y: all_gather(partial, BOTH), "gathering parts of a sum"),  # type: ignore[arg-type]
    "reduce_over_too_few_axes": (
        lambda x, rows, combine, partial, y: reduce(partial, scatter_over=("expert",)),
        "must be reduced over exactly these axes",
    ),
    "sum_heads_of_a_feed_forward": (
        lambda x, rows, combine, partial, y: WholeResidual(PLACEMENT).sum_heads(partial),
        "must be reduced over exactly these axes",
    ),
    "add_sums_over_different_axes": (
        lambda x, rows, combine, partial, y: partial + partial_sum(lax.pcast(x, "tensor", to="varying"), ("tensor",)),
        "over different axes",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_mistakes_are_errors_while_tracing(kind: str, mistake: str) -> None:
    body, message = MISTAKES[mistake]
    with pytest.raises(ReductionError, match=f"(?s){message}"):
        trace(kind, body)


@pytest.mark.parametrize("kind", BLOCKS)
def test_correct_use_traces(kind: str) -> None:
    trace(kind, lambda x, rows, combine, partial, y: x + y)
    trace(
        kind,
        lambda x, rows, combine, partial, y: (
            x + ScatterCombine(PLACEMENT).combine(combine.gather(rows, x), partial + partial)
        ),
    )


@pytest.mark.parametrize("kind", BLOCKS)
def test_jax_refuses_unwrapped_partial_sums(kind: str) -> None:
    with pytest.raises(Exception, match="unreduced"):
        trace(kind, lambda x, rows, combine, partial, y: x + partial._value[:CAPACITY])


DISPATCHED_MISTAKES: dict[str, tuple[Callable[[Combine, Gathered, PartialSum, PartialSum], Any], str]] = {
    "add_sums_of_other_rows": (
        lambda combine, gathered, dispatched_sum, gathered_sum: dispatched_sum + gathered_sum,
        "gathered and dispatched",
    ),
    "scatter": (
        lambda combine, gathered, dispatched_sum, gathered_sum: ScatterCombine(PLACEMENT).combine(
            gathered, dispatched_sum
        ),
        "go.* back to their owners",
    ),
    "send_gathered_rows_back": (
        lambda combine, gathered, dispatched_sum, gathered_sum: reduce_exchanged(
            gathered_sum, jnp.sum, exchanged=("expert",), sum_over=()
        ),
        "dispatched along.*can be sent back",
    ),
    "forget": (lambda combine, gathered, dispatched_sum, gathered_sum: dispatched_sum, "reduce it first"),
}


@pytest.mark.parametrize("mistake", DISPATCHED_MISTAKES)
def test_partial_sums_of_dispatched_rows_only_go_back_to_their_owners(mistake: str) -> None:
    body, message = DISPATCHED_MISTAKES[mistake]

    def run(x: jax.Array, rows: Rows) -> Any:
        combine = AllToAllCombine(PLACEMENT)
        experts, weights = jnp.zeros((CAPACITY, 1), jnp.int32), x[:, :1]
        dispatched, gathered = combine.dispatch(rows, x, experts, weights, num_local_experts=2), combine.gather(rows, x)
        sums = (each.partial_sum(lax.pcast(each.values[0], "tensor", to="varying")) for each in (dispatched, gathered))
        return body(combine, gathered, *sums)

    x, rows = jax.ShapeDtypeStruct((4 * CAPACITY, HIDDEN), jnp.float32), Rows.of([CAPACITY] * 4, PLACEMENT)
    with pytest.raises(ReductionError, match=f"(?s){message}"):
        jax.eval_shape(
            jax.shard_map(run, mesh=PLACEMENT.mesh, in_specs=(P("expert"), P()), out_specs=P("expert")), x, rows
        )


def test_a_partial_sum_keeps_its_rules_on_one_device() -> None:
    partial = partial_sum(jnp.ones(3), ())
    with pytest.raises(ReductionError):
        partial * 2.0  # type: ignore[operator]
    with pytest.raises(ReductionError):
        jax.jit(lambda: partial)()
    np.testing.assert_array_equal(reduce(partial), np.ones(3))
    with pytest.raises(ReductionError):
        reduce(reduce(partial))  # type: ignore[arg-type]


def test_sum_devices_counts_each_device_once() -> None:
    total = jax.shard_map(
        lambda x: sum_devices({"total": x.sum()}, ("expert",))["total"],
        mesh=PLACEMENT.mesh,
        in_specs=P("expert"),
        out_specs=P(),
    )
    assert jax.jit(total)(jnp.arange(8.0)) == 28


def test_argsort_varies_over_the_axes_of_its_keys() -> None:
    def gradient_of_gathered(x: jax.Array, keys: jax.Array) -> jax.Array:
        return sum_devices(x[argsort(keys)[:1]].sum(), ("expert",))

    mapped = jax.shard_map(gradient_of_gathered, mesh=PLACEMENT.mesh, in_specs=(P(), P("expert")), out_specs=P())
    keys = jnp.array([0, 1, 1, 0, 0, 1, 0, 1])  # the four devices take elements 0, 1, 0 and 0
    np.testing.assert_array_equal(jax.jit(jax.grad(mapped))(jnp.ones(2), keys), [3, 1])


def test_a_shard_map_that_is_not_compiled_is_refused() -> None:
    mapped = jax.shard_map(
        lambda x: sum_devices(x.sum(), ("expert",)), mesh=PLACEMENT.mesh, in_specs=P("expert"), out_specs=P()
    )
    with pytest.raises(PlacementError, match=r"not compiled.*write jax.jit\(jax.shard_map"):
        mapped(jnp.arange(8.0))
