"""Layers in a user's own model: Flax's helpers split them, `on_mesh` runs them, and errors say what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blocks import Block
from flax import nnx
from jax.sharding import PartitionSpec as P
from placements import placement

from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.config import AttentionConfig, DenseConfig, MoEConfig, Norm, RouterConfig, SharedExpertConfig
from moe_jax.errors import PlacementError
from moe_jax.layers import Attention, DenseMLP, MoE, Vocabulary, on_mesh, specs
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import Placement, ReduceCombine, Role, Rows, ScatterCombine, WholeResidual
from moe_jax.sharding import collectives as c

HIDDEN, CAPACITY = 16, 4
EIGHT, MIXED, FOUR_BY_TWO = "dp8_ep8", "dp2_ep4", "dp4_ep4_tp2"
ALL = ("data", "expert", "tensor")


def moe(rngs: nnx.Rngs) -> MoE:
    config = MoEConfig(8, 2, 8, RouterConfig(), shared=SharedExpertConfig(8, gated=False))
    return MoE(config, HIDDEN, dtype=jnp.float32, rngs=rngs)


def dense(rngs: nnx.Rngs) -> DenseMLP:
    return DenseMLP(DenseConfig(16), HIDDEN, dtype=jnp.float32, rngs=rngs)


def attention(rngs: nnx.Rngs, kv_heads: int = 4) -> Attention:
    config = AttentionConfig(heads=8, kv_heads=kv_heads, head_dim=4, rope=None)
    return Attention(config, HIDDEN, Norm.RMS, 1e-6, dtype=jnp.float32, rngs=rngs)


SPLIT = {
    (moe, EIGHT): {
        "router.weight": P(None, None),
        "experts.gate_up": P("expert", None, None, None),
        "experts.down": P("expert", None, None),
        "shared.swiglu.gate_up": P(None, None, "expert"),
        "shared.swiglu.down": P("expert", None),
    },
    (moe, MIXED): {
        "router.weight": P(None, None),
        "experts.gate_up": P(("data", "expert"), None, None, "tensor"),
        "experts.down": P(("data", "expert"), "tensor", None),
        "shared.swiglu.gate_up": P(None, None, ALL),
        "shared.swiglu.down": P(ALL, None),
    },
    (moe, FOUR_BY_TWO): {
        "router.weight": P(None, None),
        "experts.gate_up": P("expert", None, None, "tensor"),
        "experts.down": P("expert", "tensor", None),
        "shared.swiglu.gate_up": P(None, None, ("expert", "tensor")),
        "shared.swiglu.down": P(("expert", "tensor"), None),
    },
    (dense, EIGHT): {"swiglu.gate_up": P(None, None, "expert"), "swiglu.down": P("expert", None)},
    (dense, MIXED): {"swiglu.gate_up": P(None, None, ALL), "swiglu.down": P(ALL, None)},
    (dense, FOUR_BY_TWO): {
        "swiglu.gate_up": P(None, None, ("expert", "tensor")),
        "swiglu.down": P(("expert", "tensor"), None),
    },
    **{
        (attention, where): {
            "query.weight": P(None, heads, None),
            "key.weight": P(None, heads, None),
            "value.weight": P(None, heads, None),
            "output": P(heads, None, None),
        }
        for where, heads in ((EIGHT, None), (MIXED, ("expert", "tensor")), (FOUR_BY_TWO, "tensor"))
    },
}  # fmt: skip


def by_name(tree: nnx.State) -> dict[str, Any]:
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(tree)}


@pytest.mark.parametrize(("make", "where"), SPLIT, ids=lambda part: getattr(part, "__name__", part))
def test_flax_splits_parameters_as_the_placement_does(make: Callable[[nnx.Rngs], nnx.Module], where: str) -> None:
    mesh_placement, state = placement(where), nnx.state(make(nnx.Rngs(0)))
    with nnx.logical_axis_rules(mesh_placement.rules):
        by_flax, shardings = nnx.get_partition_spec(state), nnx.get_named_sharding(state, mesh_placement.mesh)
    assert by_name(by_flax) == by_name(specs(state, mesh_placement)) == SPLIT[make, where]
    for name, array in by_name(jax.device_put(state, shardings)).items():
        parts = len({str(shard.index) for shard in array.addressable_shards})
        axes = [axis for dim in SPLIT[make, where][name] if dim for axis in ([dim] if isinstance(dim, str) else dim)]
        assert parts == mesh_placement.device_count(tuple(axes)), name


def test_specs_replicate_few_kv_heads_and_flax_refuses_to_split_them() -> None:
    mesh_placement, layer = placement(MIXED), attention(nnx.Rngs(0), kv_heads=2)
    found = by_name(specs(layer, mesh_placement))
    assert found["key.weight"] == found["value.weight"] == P(None, None, None)
    assert found["query.weight"] == P(None, ("expert", "tensor"), None)
    with nnx.logical_axis_rules(mesh_placement.rules):
        shardings = nnx.get_named_sharding(nnx.state(layer), mesh_placement.mesh)
    with pytest.raises(ValueError, match="dimension size is 2"):
        jax.device_put(nnx.state(layer), shardings)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_stacked_parameters_of_a_decoder_have_the_same_metadata(scan_layers: bool) -> None:
    config = Checkpoint(ADDER).config
    decoder = ShardedDecoder(config, placement(MIXED), "float32", scan_layers)
    with nnx.logical_axis_rules(decoder.placement.rules):
        by_flax = by_name(nnx.get_partition_spec(decoder.parameters))
    assert by_flax == by_name(decoder.parameter_specs)
    down = next(spec for name, spec in by_flax.items() if name.endswith("experts.down"))
    assert down == P(None, ("data", "expert"), "tensor", None)


def test_specs_leave_variables_of_other_modules_to_flax() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.moe = moe(nnx.Rngs(0))
            self.split = nnx.Param(jnp.zeros((4, 4)), out_sharding=("mine", None), eager_sharding=False)
            self.whole = nnx.Param(jnp.zeros((4, 4)))

    with nnx.logical_axis_rules([("mine", "tensor")]):
        found = by_name(specs(Model(), placement(FOUR_BY_TWO)))
    assert found["split"] == P("tensor", None)
    assert found["whole"] == P()
    assert found["moe.experts.down"] == P("expert", "tensor", None)


def test_a_layer_can_be_created_with_or_without_a_mesh() -> None:
    """Flax shards a variable with sharding metadata when it is created, unless `eager_sharding` is off."""
    mesh_placement = placement(FOUR_BY_TWO)
    with jax.set_mesh(mesh_placement.mesh):
        layer = moe(nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-3), wrt=nnx.Param)
    with nnx.logical_axis_rules(mesh_placement.rules):
        found = by_name(nnx.get_partition_spec(nnx.state(optimizer)))
    moments = [spec for name, spec in found.items() if name.endswith("experts.down")]
    assert moments == 2 * [P("expert", "tensor", None)], "moments are split as their parameters are"


@pytest.mark.parametrize("make", [moe, dense])
@pytest.mark.parametrize("where", [EIGHT, MIXED, FOUR_BY_TWO])
def test_on_mesh_equals_an_explicit_shard_map(make: Callable[[nnx.Rngs], nnx.Module], where: str) -> None:
    mesh_placement = placement(where)
    block, layer = Block(make, mesh_placement), make(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (block.shards * CAPACITY, HIDDEN))
    counts = [CAPACITY - shard % 2 for shard in range(block.shards)]
    ragged = ReduceCombine.sized(mesh_placement, counts, CAPACITY)
    for combine, rows in ((None, Rows.full(CAPACITY)), (ragged, Rows.of(counts, mesh_placement, CAPACITY))):
        y, load = on_mesh(layer, mesh_placement, combine)(x.reshape(-1, 2, HIDDEN), rows)
        explicit = jax.jit(block.program(combine or ScatterCombine(mesh_placement)))(block.parameters, x, rows)
        np.testing.assert_array_equal(y.reshape(x.shape), explicit)
        if load is not None:
            real = x.shape[0] if rows.counts is None else sum(counts)
            assert float(load.assignments.sum()) == 2 * real


def test_gradients_through_on_mesh_equal_those_of_one_device() -> None:
    layer = moe(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2 * CAPACITY, HIDDEN))

    def gradients(where: str) -> dict[str, Any]:
        def loss(layer: MoE) -> jax.Array:
            return jnp.sum(on_mesh(layer, placement(where))(x)[0] ** 2)

        return by_name(nnx.grad(loss)(layer))

    split = gradients(FOUR_BY_TWO)
    for name, expected in gradients("single").items():
        np.testing.assert_allclose(split[name], expected, atol=1e-4, rtol=1e-4, err_msg=name)


X = jnp.ones((8, HIDDEN))
TENSOR = "tensor=8"
OUTSIDE = {
    "moe gathers": lambda: moe(nnx.Rngs(0))(X, Rows.full(8), ScatterCombine(placement(EIGHT))),
    "moe sums": lambda: moe(nnx.Rngs(0))(X, Rows.full(8), ScatterCombine(Placement.parse(TENSOR))),
    "dense gathers": lambda: dense(nnx.Rngs(0))(X, Rows.full(8), ScatterCombine(placement(EIGHT))),
    "dense sums": lambda: dense(nnx.Rngs(0))(X, Rows.full(8), ScatterCombine(Placement.parse(TENSOR))),
    "masked rows": lambda: Rows.of([1] * 8, placement(EIGHT)).valid(placement(EIGHT)),
    "embedding": lambda: Vocabulary(Checkpoint(ADDER).config, dtype=jnp.float32, rngs=nnx.Rngs(0)).embed(
        jnp.zeros(8, jnp.int32), WholeResidual(Placement.parse(TENSOR))
    ),
    "heads": lambda: WholeResidual(Placement.parse(TENSOR)).heads_partial_sum(X),
    "columns": lambda: WholeResidual(Placement.parse(TENSOR)).gather_columns(X),
    "exchange": lambda: c.exchange(X, jnp.ones(8), jnp.ones(8), ("expert",), ragged=False),
    "totals": lambda: c.sum_devices(X, ("expert",)),
    "under jit": lambda: jax.jit(partial(c.all_gather, axes=("expert",)))(X),
}  # fmt: skip


@pytest.mark.parametrize("call", OUTSIDE.values(), ids=OUTSIDE)
def test_calling_a_layer_outside_of_its_mesh_is_an_error(call: Callable[[], object]) -> None:
    with pytest.raises(
        PlacementError, match=r"outside of its mesh.*y, load = moe_jax.layers.on_mesh\(layer, placement"
    ):
        call()


def test_on_one_device_layers_need_no_mesh() -> None:
    single = placement("single")
    y, _ = dense(nnx.Rngs(0))(X, Rows.full(8), ScatterCombine(single))
    np.testing.assert_allclose(y, on_mesh(dense(nnx.Rngs(0)), single)(X)[0], atol=1e-6)


def test_errors_name_the_dimension_that_does_not_divide() -> None:
    eight, six = placement(EIGHT), placement("dp6_ep6")
    with pytest.raises(PlacementError, match=r"dimension 0 of experts.down is 8, .* 6 devices \(experts: expert=6\)"):
        specs(moe(nnx.Rngs(0)), six)
    with pytest.raises(PlacementError, match=r"7 rows do not divide over 8 devices \(tokens: expert=8\)"):
        on_mesh(moe(nnx.Rngs(0)), eight)(X[:7])
    with pytest.raises(PlacementError, match="combine is made for the placement"):
        on_mesh(moe(nnx.Rngs(0)), eight, ScatterCombine(six))


def test_every_role_has_a_rule() -> None:
    assert dict(placement(FOUR_BY_TWO).rules) == {
        Role.TOKENS: ("expert",),
        Role.HEADS: ("tensor",),
        Role.KV_HEADS: ("tensor",),
        Role.EXPERTS: ("expert",),
        Role.FFN: ("tensor",),
        Role.PARTIAL: ("expert", "tensor"),
    }
