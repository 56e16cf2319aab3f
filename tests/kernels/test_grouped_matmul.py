"""Grouped matmuls by every backend, against a loop over groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import WeightDtype
from moe_jax.kernels.grouped_matmul import (
    GroupedMatmul,
    LoopGroupedMatmul,
    PallasGroupedMatmul,
    RaggedDotGroupedMatmul,
    grouped_matmul,
)
from moe_jax.kernels.grouped_matmul.loop import MAX_BLOCK, loop_over_blocks
from moe_jax.kernels.grouped_matmul.pallas import MIN_TILE_ROWS, tile_rows
from moe_jax.kernels.quantized import QuantizedWeight
from moe_jax.kernels.stacked_weight import StackedWeight

ROWS, GROUPS, INPUTS, OUTPUTS = 40, 5, 8, 6
BACKENDS = (LoopGroupedMatmul(shards=4), RaggedDotGroupedMatmul(), PallasGroupedMatmul(shards=4, interpret=True))
grouped_matmul_jit = jax.jit(grouped_matmul, static_argnames="backend")
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__.lower())


def draw_inputs(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = (rows, INPUTS), (GROUPS, INPUTS, OUTPUTS)
    return tuple(random.normal(size=shape).astype(np.float32) for shape in shapes)  # type: ignore[return-value]


def loop_over_groups(rows: np.ndarray, weights: np.ndarray, sizes: list[int]) -> np.ndarray:
    out = np.zeros((len(rows), weights.shape[2]), np.float32)
    first = 0
    for group, size in enumerate(sizes):
        out[first : first + size] = rows[first : first + size] @ weights[group]
        first += size
    return out


@every_backend
@settings(deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, ROWS), min_size=GROUPS, max_size=GROUPS))
def test_equals_a_loop_over_groups(backend: GroupedMatmul, cuts: list[int]) -> None:
    """Rows beyond the groups are NaN."""
    rows, weights = draw_inputs()
    sizes = np.diff(sorted(cuts), prepend=0).tolist()
    rows[sum(sizes) :] = np.nan
    got = grouped_matmul_jit(rows, weights, jnp.array(sizes), backend)
    np.testing.assert_allclose(got, loop_over_groups(rows, weights, sizes), atol=1e-5)


@every_backend
@pytest.mark.parametrize("sizes", [[0] * 5, [40, 0, 0, 0, 0], [0, 0, 0, 0, 40], [0, 17, 0, 23, 0], [1] * 5])
def test_extreme_sizes_and_nan_beyond_the_groups(backend: GroupedMatmul, sizes: list[int]) -> None:
    rows, weights = draw_inputs()
    rows[sum(sizes) :] = np.nan
    got = grouped_matmul_jit(rows, weights, jnp.array(sizes), backend)
    np.testing.assert_allclose(got, loop_over_groups(rows, weights, sizes), atol=1e-5)


@every_backend
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_fewer_rows_than_a_block(backend: GroupedMatmul, rows: int) -> None:
    x, weights = draw_inputs(rows)
    sizes = [0, rows, 0, 0, 0]
    got = grouped_matmul_jit(x, weights, jnp.array(sizes), backend)
    np.testing.assert_allclose(got, loop_over_groups(x, weights, sizes), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[::2], ids=["loop", "pallas"])
def test_more_than_a_tile_of_rows_inputs_and_outputs(backend: GroupedMatmul) -> None:
    random = np.random.default_rng(1)
    rows, weights = random.normal(size=(300, 70)), random.normal(size=(3, 70, 130))
    for sizes in ([300, 0, 0], [129, 1, 170], [5, 200, 0]):
        got = grouped_matmul_jit(rows.astype(np.float32), weights.astype(np.float32), jnp.array(sizes), backend)
        np.testing.assert_allclose(got, loop_over_groups(rows, weights, sizes), atol=1e-4)


@every_backend
def test_weights_are_read_from_the_stack_of_layers(backend: GroupedMatmul) -> None:
    rows, weights = draw_inputs()
    stack = jnp.stack([jnp.full_like(weights, jnp.nan), weights, jnp.full_like(weights, jnp.nan)])
    sizes = [3, 0, 20, 1, 2]
    got = grouped_matmul_jit(rows, weights, jnp.array(sizes), backend, StackedWeight(stack, jnp.array(1)))
    np.testing.assert_allclose(got, loop_over_groups(rows, weights, sizes), atol=1e-5)


@every_backend
@pytest.mark.parametrize("kind", [WeightDtype.INT8, WeightDtype.FLOAT8])
@pytest.mark.parametrize("blocks", [1, 3, 24])
def test_weights_in_eight_bits_equal_decoded_weights(backend: GroupedMatmul, kind: WeightDtype, blocks: int) -> None:
    """Every number of either format, with one scale per output, or per block of 64 or of 8 inputs."""
    random, inputs = np.random.default_rng(0), 192
    bits = np.arange(256, dtype=np.uint8)[np.arange(256) % 128 != 127]  # float8's two NaNs
    numbers = random.permutation(np.resize(bits, 2 * GROUPS * inputs * OUTPUTS)).reshape(2, GROUPS, inputs, OUTPUTS)
    scales = random.uniform(0.5, 2, (2, GROUPS, blocks, OUTPUTS)).astype(np.float32)
    weights = numbers.view(kind.value).astype(np.float32) * np.repeat(scales, inputs // blocks, axis=2)
    rows, sizes = random.normal(size=(ROWS, inputs)).astype(np.float32), [3, 0, 20, 1, 2]
    stack = QuantizedWeight(jnp.asarray(numbers.view(np.int8)), jnp.asarray(scales), kind, "float32")
    got = grouped_matmul_jit(
        rows, jnp.zeros(weights.shape[1:]), jnp.array(sizes), backend, StackedWeight(stack, jnp.array(1))
    )
    expected = loop_over_groups(rows, weights[1], sizes)
    np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@every_backend
@pytest.mark.parametrize("sizes", [[8] * 5, [0] * 5, [40, 0, 0, 0, 0], [3, 0, 20, 1, 2]])
def test_gradients_equal_those_of_a_dense_expansion(backend: GroupedMatmul, sizes: list[int]) -> None:
    rows, weights = draw_inputs()
    group_of_row = np.repeat(np.arange(GROUPS), sizes)
    chosen = np.zeros((ROWS, GROUPS), np.float32)
    chosen[np.arange(len(group_of_row)), group_of_row] = 1

    def dense(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.einsum("md,gdf,mg->mf", rows, weights, chosen) ** 2)

    def grouped(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(grouped_matmul(rows, weights, jnp.array(sizes), backend) ** 2)

    expected = jax.grad(dense, argnums=(0, 1))(jnp.asarray(rows), jnp.asarray(weights))
    got = jax.jit(jax.grad(grouped, argnums=(0, 1)))(rows, weights)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_work_grows_with_the_rows_and_not_with_the_groups() -> None:
    def visited_rows(rows: int, sizes: list[int]) -> int:
        size = LoopGroupedMatmul().block_size(rows, len(sizes))
        add = lambda *args: args[-1] + size  # noqa: E731
        return int(loop_over_blocks(jnp.array(sizes), size, rows, lambda group: None, add, 0))

    # Each group wastes at most a block, and groups without rows cost nothing.
    assert visited_rows(4096, [512] * 8) == 4096
    assert visited_rows(4096, [4096] + [0] * 127) == 4120
    assert visited_rows(4096, [0] * 128) == 0
    assert visited_rows(4096, [32] * 128) == 1.25 * 4096
    assert visited_rows(4096, [33] * 64 + [0] * 64) == 40 * 64
    assert visited_rows(10**6, [5] * 8) == 8 * MAX_BLOCK


def test_tiles_compute_few_idle_rows() -> None:
    def computed(sizes: list[int]) -> int:
        size = tile_rows(sum(sizes), len(sizes))
        return size * sum(-(-group // size) for group in sizes)

    random = np.random.default_rng(0)
    shares = random.multinomial(2048, [1 / 16] * 16).tolist()
    assert computed(shares) <= 1.3 * 2048
    assert computed([2048] + [0] * 15) == 2048
    assert computed([4] * 16) == 16 * MIN_TILE_ROWS, "each group fills one tile of the smallest size"


@pytest.mark.parametrize("backend", [LoopGroupedMatmul(), PallasGroupedMatmul()], ids=["loop", "pallas"])
def test_no_operation_is_as_large_as_an_expansion_over_groups(backend: GroupedMatmul) -> None:
    rows, groups, width = 64, 33, 16
    shapes = (jnp.zeros((rows, width)), jnp.zeros((groups, width, width)), jnp.zeros(groups, jnp.int32))
    jaxpr = str(jax.make_jaxpr(grouped_matmul, static_argnums=3)(*shapes, backend))
    assert "dot_general" in jaxpr
    assert f"[{groups},{rows},{width}]" not in jaxpr
    assert f"[{rows},{groups},{width}]" not in jaxpr
