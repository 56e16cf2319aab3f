from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.config import (
    AttentionConfig,
    DenseConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_jax.errors import PlacementError
from moe_jax.sharding import Placement, Role, as_placement, check_divisibility, make_mesh


def model(heads: int = 8, kv_heads: int = 4, experts: int = 8, width: int = 16, shared: int = 16) -> ModelConfig:
    attention = AttentionConfig(heads, kv_heads, 8, RopeConfig(1e4))
    moe = MoEConfig(experts, 2, width, router=RouterConfig(norm=1), shared=SharedExpertConfig(shared, gated=False))
    layers = (LayerConfig(attention, DenseConfig(32)), LayerConfig(attention, moe))
    return ModelConfig(100, 16, layers, 1e-6, 64)


def test_parse_inverts_str() -> None:
    text = "data=2,expert=2,tensor=2; tokens=data; heads=expert,tensor; experts=data,expert; ffn=tensor"
    placement = Placement.parse(text)
    assert placement == Placement(
        make_mesh("data=2,expert=2,tensor=2"), ("data",), ("expert", "tensor"), ("data", "expert")
    )
    assert str(placement) == text
    assert as_placement(str(placement)) == placement
    assert Placement.parse("expert=2; heads=tensor; ffn=").ffn == ()


def test_roles_determine_scatter_axes_and_sum_axes() -> None:
    placement = Placement.parse("data=2,expert=2,tensor=2; tokens=data; heads=expert,tensor; experts=data,expert")
    assert placement.axes(Role.PARTIAL) == ("data", "expert", "tensor")
    assert placement.scatter_axes == ("data",)
    assert placement.sum_axes == ("expert", "tensor")
    replicas = Placement.parse("data=2,expert=4")
    assert (replicas.scatter_axes, replicas.sum_axes) == (("expert",), ())
    assert replicas.gather_shards == 4
    assert replicas.size(Role.TOKENS) == 8


def test_axes_of_size_one_are_left_out() -> None:
    placement = Placement.parse("expert=8")
    assert placement.axes(Role.TOKENS) == ("expert",)
    assert placement.spec((Role.TOKENS, Role.HEADS, None), (8, 4, 4)) == P(("expert",), None, None)


def test_layer_dimensions_are_not_split_and_few_kv_heads_are_replicated() -> None:
    placement = Placement.parse("expert=2,tensor=4")
    assert placement.spec((Role.EXPERTS, None, Role.FFN), (12, 8, 16, 32)) == P(None, ("expert",), None, ("tensor",))
    assert placement.spec((None, Role.KV_HEADS, None), (16, 4, 8)) == P(None, ("tensor",), None)
    assert placement.spec((None, Role.KV_HEADS, None), (16, 2, 8)) == P(None, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,tensor=4; tokens=data,tensor", "cannot split both tokens and heads: .'tensor'."),
        ("expert=8; experts=expert; ffn=expert", "cannot split both experts and ffn"),
        ("data=2,expert=4; tokens=expert", "must cover the mesh: data=2 splits neither"),
        ("expert=8; token=expert", "cannot read 'token=expert'"),
        ("expert=8; tokens=experts", "unknown mesh axes"),
        ("expert=8; tokens", "cannot read 'tokens'"),
    ],
)
def test_invalid_roles_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Placement.parse(text)


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("expert=8", model(experts=6), r"6 experts do not divide over 8 devices \(experts: expert=8\)"),
        ("tensor=8", model(heads=12, kv_heads=12), "12 attention heads do not divide over 8 devices"),
        ("tensor=4", model(heads=12, kv_heads=6), "6 KV heads neither divide over 4 devices"),
        (
            "expert=2,tensor=4",
            model(width=10),
            r"10 units of expert width do not divide over 4 devices \(ffn: tensor=4\)",
        ),
        ("expert=4,tensor=2", model(shared=20), "20 units of shared-expert width do not divide over 8 devices"),
        (
            "data=3; experts=data",
            model(experts=3, shared=3),
            "32 units of dense MLP width do not divide over 3 devices",
        ),
    ],
)
def test_models_that_do_not_divide_are_refused_with_the_numbers(text: str, config: ModelConfig, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        check_divisibility(config, Placement.parse(text))


def test_all_sizes_that_do_not_divide_are_named_at_once() -> None:
    with pytest.raises(PlacementError) as caught:
        check_divisibility(
            model(heads=6, kv_heads=3, experts=5, width=6, shared=6), Placement.parse("expert=2,tensor=4")
        )
    for words in ("6 attention heads", "3 KV heads", "5 experts", "6 units of expert width", "6 units of shared"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("attention_dp", "ep", "replicas", "text"),
    [
        (8, 8, 1, "data=1,expert=1,tensor=8; tokens=data,expert,tensor; heads=; experts=tensor; ffn="),
        (4, 4, 1, "data=1,expert=4,tensor=2; tokens=data,expert; heads=tensor; experts=expert; ffn=tensor"),
        (2, 4, 1, "data=2,expert=2,tensor=2; tokens=data; heads=expert,tensor; experts=data,expert; ffn=tensor"),
        (8, 4, 1, "data=1,expert=4,tensor=2; tokens=data,expert,tensor; heads=; experts=expert; ffn=tensor"),
        (4, 4, 2, "data=1,expert=2,tensor=4; tokens=data,expert,tensor; heads=; experts=tensor; ffn="),
        (1, 4, 1, "data=1,expert=4,tensor=2; tokens=data; heads=expert,tensor; experts=expert; ffn=tensor"),
    ],
)
def test_placements_from_parallelism_sizes(attention_dp: int, ep: int, replicas: int, text: str) -> None:
    placement = Placement.from_sizes(8, attention_dp, ep, replicas)
    assert str(placement) == text
    assert placement.size(Role.TOKENS) == attention_dp * replicas
    assert placement.size(Role.EXPERTS) == ep


@pytest.mark.parametrize(
    ("attention_dp", "ep", "replicas"),
    [(3, 4, 1), (4, 6, 1), (4, 4, 3), (16, 4, 1), (0, 4, 1), (4, 4, 0), (4, 4, -1)],
)
def test_impossible_sizes_are_refused(attention_dp: int, ep: int, replicas: int) -> None:
    with pytest.raises(PlacementError, match=rf"8 devices, {replicas} replicas, attention_dp={attention_dp}, ep={ep}"):
        Placement.from_sizes(8, attention_dp, ep, replicas)


def test_more_devices_than_there_are_are_refused() -> None:
    with pytest.raises(PlacementError, match="needs 16 devices, there are 8"):
        Placement.from_sizes(16, 8, 8)


def test_roles_must_be_tuples() -> None:
    with pytest.raises(PlacementError, match="tokens must be a tuple of axis names, got 'expert'"):
        Placement(Placement.parse("expert=2").mesh, tokens="expert")  # type: ignore[arg-type]
