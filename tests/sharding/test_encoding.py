"""Rows gathered in one byte per number: the loss of precision, and that rows are independent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import Block, collect, spread
from placements import placement

from moe_jax.config import MoEConfig, RouterConfig
from moe_jax.errors import ConfigError
from moe_jax.layers import MoE
from moe_jax.sharding import AllToAllCombine, Combine, RaggedCombine, ReduceCombine, Rows, ScatterCombine, as_encoding
from moe_jax.sharding.encoding import BLOCK, ENCODINGS, Encoding

MAX_ERROR = {"float8_e4m3fn": 2**-4, "int8": 0.5 / 127}
"""Largest error of a number, relative to the largest number of its block. Floats have 4 significant bits."""


def random_rows(rows: int, width: int) -> np.ndarray:
    scales = 10.0 ** np.random.default_rng(1).integers(-6, 6, (rows, 1))
    return (np.random.default_rng(0).normal(size=(rows, width)) * scales).astype(np.float32)


def round_trip(encoding: Encoding, x: np.ndarray) -> np.ndarray:
    return np.asarray(encoding.decode(*encoding.encode(jnp.asarray(x)), jnp.float32))


@pytest.mark.parametrize("width", [24, 2 * BLOCK])
@pytest.mark.parametrize("name", MAX_ERROR)
def test_decoded_numbers_are_close(name: str, width: int) -> None:
    x, encoding = random_rows(6, width), as_encoding(name)
    x[1] = 0
    encoded, scales = encoding.encode(jnp.asarray(x))
    assert encoded.nbytes + scales.nbytes == 6 * sum(encoding.row_bytes(width, "float32"))
    blocks = x.reshape(6, scales.shape[1], -1)
    error = np.abs(round_trip(encoding, x).reshape(blocks.shape) - blocks)
    assert (error <= 1.01 * MAX_ERROR[name] * np.abs(blocks).max(axis=-1, keepdims=True)).all()


@pytest.mark.parametrize("name", MAX_ERROR)
def test_rows_are_independent(name: str) -> None:
    x = random_rows(4, 24)
    clean = round_trip(as_encoding(name), x)
    x[2] = np.nan
    x[3] = np.inf
    np.testing.assert_array_equal(round_trip(as_encoding(name), x)[:2], clean[:2])


@pytest.mark.parametrize("name", ENCODINGS)
def test_blocks_compute_with_decoded_rows(name: str) -> None:
    """Every strategy gathers decoded rows, and sums exactly."""
    config, capacity, encoding = MoEConfig(8, 2, 16, RouterConfig(norm=1)), 8, as_encoding(name)
    block = Block(lambda rngs: MoE(config, 24, dtype=jnp.float32, rngs=rngs), placement("dp8_ep8"))
    block.parameters["router"]["weight"].set_value(
        jax.device_put(jnp.ones((24, 8)) * jnp.arange(8), block.parameters["router"]["weight"].sharding)
    )
    counts = [capacity, 1, 0, 2, 0, 0, 0, 1]
    strategies: list[Combine] = [
        ScatterCombine(block.placement, encoding=encoding),
        ReduceCombine(block.placement, 64, encoding=encoding),
        ReduceCombine(block.placement, sum(counts), encoding=encoding),  # packs before it moves
        RaggedCombine(block.placement, 1, 8, encoding=encoding),
        AllToAllCombine(block.placement, encoding=encoding),
    ]
    x = np.abs(random_rows(sum(counts), 24))  # of one sign, so that rounding does not change the routing
    rows = Rows.of(counts, block.placement, capacity)
    plain = jax.jit(block.program(ScatterCombine(block.placement)))
    expected = collect(
        plain(block.parameters, spread(round_trip(encoding, x), counts, capacity), rows), counts, capacity
    )
    for strategy in strategies:
        spread_rows = spread(x, counts, capacity, fill=np.nan)
        got = collect(jax.jit(block.program(strategy))(block.parameters, spread_rows, rows), counts, capacity)
        np.testing.assert_allclose(
            got,
            expected,
            rtol=1e-4,
            atol=1e-5 * np.abs(expected).max(axis=1, keepdims=True).max(),
            err_msg=str(strategy),
        )


@pytest.mark.parametrize("name", MAX_ERROR)
def test_numbers_too_small_for_a_scale_become_zero(name: str) -> None:
    x = np.full((1, 24), np.finfo(np.float32).tiny, np.float32)
    x[0, 1:] = 1e-41
    np.testing.assert_array_equal(round_trip(as_encoding(name), x), 0)


@pytest.mark.parametrize("name", ["fp4", ["int8"]])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="gather_dtype must be exact, float8_e4m3fn, int8, got"):
        as_encoding(name)
