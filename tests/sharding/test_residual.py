"""Rows of a token shard that each device keeps if heads are split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from placements import placement

from moe_jax.sharding import ResidualLayout, Role, RowBytes, Rows, SplitResidual, WholeResidual
from moe_jax.sharding.mesh import AXES
from moe_jax.sharding.traffic import Kind, sent_bytes

WITH_HEADS = ["dp4_ep4_tp2", "dp2_ep4", "tp8_ep4", "dp2_moe_tp8"]
WIDTH = 3


@pytest.mark.parametrize("capacity", [1, 4, 7])
@pytest.mark.parametrize("kind", [WholeResidual, SplitResidual])
@pytest.mark.parametrize("where", WITH_HEADS)
def test_summed_rows_can_be_gathered_again(where: str, kind: type[ResidualLayout], capacity: int) -> None:
    residual = kind(placement(where))

    def run(parts: jax.Array) -> jax.Array:
        kept = residual.sum_heads(residual.heads_partial_sum(parts[0]))
        assert kept.shape == (residual.capacity(capacity), WIDTH)
        return residual.all_rows(kept, capacity)

    mesh = residual.placement.mesh
    all_axes = SplitResidual(residual.placement).ffn_placement.axes(Role.TOKENS)
    parts = np.random.default_rng(0).normal(size=(8, capacity, WIDTH)).astype(np.float32)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=P(all_axes), out_specs=P(residual.placement.axes(Role.TOKENS)))
    by_device = parts.reshape(*mesh.devices.shape, capacity, WIDTH)
    heads = tuple(AXES.index(axis) for axis in residual.placement.axes(Role.HEADS))
    expected = by_device.sum(axis=heads).reshape(-1, WIDTH)
    np.testing.assert_allclose(jax.jit(mapped)(parts), expected, atol=1e-5)


@pytest.mark.parametrize("where", WITH_HEADS)
def test_each_device_keeps_a_part_of_its_shard(where: str) -> None:
    residual = SplitResidual(placement(where))
    shards, devices = (residual.placement.size(role) for role in (Role.TOKENS, Role.HEADS))
    for capacity in (1, 5, 8):
        counts = [(3 * shard + 2) % (capacity + 1) for shard in range(shards)]
        kept = np.array(residual.counts(counts, capacity))
        on_device = residual.rows(Rows(jnp.array(counts, jnp.int32), capacity))
        assert on_device.counts is not None
        assert on_device.counts.tolist() == kept.tolist()
        assert on_device.capacity == residual.capacity(capacity) == -(-capacity // devices)
        assert kept.sum() == sum(counts)
        assert kept.size == residual.ffn_placement.size(Role.TOKENS) == 8


def test_full_rows_stay_full_if_they_divide() -> None:
    residual = SplitResidual(placement("dp4_ep4_tp2"))
    assert residual.rows(Rows.full(6)).counts is None
    odd = residual.rows(Rows.full(5)).counts
    assert odd is not None
    assert odd.tolist() == [3, 2] * 4


@pytest.mark.parametrize("where", WITH_HEADS)
def test_both_layouts_send_equal_bytes_and_split_rows_need_no_all_reduce(where: str) -> None:
    row = RowBytes(gather=4, combine=4)
    whole, split = (kind(placement(where)).moves(64, row) for kind in (WholeResidual, SplitResidual))
    assert sent_bytes(whole) == sent_bytes(split)
    assert [move.kind for move in whole] == [Kind.ALL_REDUCE]
    assert [move.kind for move in split] == [Kind.ALL_GATHER, Kind.REDUCE_SCATTER]
    assert not SplitResidual(placement(where)).ffn_placement.sum_axes
