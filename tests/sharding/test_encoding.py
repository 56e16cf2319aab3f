"""Rows gathered in a byte per number: what it costs in precision, and that no row touches another."""

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

SMALL = {"float8_e4m3fn": 2**-4, "int8": 0.5 / 127}
"""By what part of its block's largest number one is off at most; of itself, for floats of 4 significant bits."""


def drawn(rows: int, width: int) -> np.ndarray:
    scales = 10.0 ** np.random.default_rng(1).integers(-6, 6, (rows, 1))
    return (np.random.default_rng(0).normal(size=(rows, width)) * scales).astype(np.float32)


def there_and_back(encoding: Encoding, x: np.ndarray) -> np.ndarray:
    return np.asarray(encoding.decode(*encoding.encode(jnp.asarray(x)), jnp.float32))


@pytest.mark.parametrize("width", [24, 2 * BLOCK])
@pytest.mark.parametrize("name", SMALL)
def test_numbers_come_back_nearly(name: str, width: int) -> None:
    x, encoding = drawn(6, width), as_encoding(name)
    x[1] = 0
    sent, scales = encoding.encode(jnp.asarray(x))
    assert sent.nbytes + scales.nbytes == 6 * sum(encoding.row_bytes(width, "float32"))
    blocks = x.reshape(6, scales.shape[1], -1)
    off = np.abs(there_and_back(encoding, x).reshape(blocks.shape) - blocks)
    assert (off <= 1.01 * SMALL[name] * np.abs(blocks).max(axis=-1, keepdims=True)).all()


@pytest.mark.parametrize("name", SMALL)
def test_no_row_touches_another(name: str) -> None:
    x = drawn(4, 24)
    clean = there_and_back(as_encoding(name), x)
    x[2] = np.nan
    x[3] = np.inf
    np.testing.assert_array_equal(there_and_back(as_encoding(name), x)[:2], clean[:2])


@pytest.mark.parametrize("name", ENCODINGS)
def test_blocks_see_the_rows_that_were_sent(name: str) -> None:
    """Every strategy gathers rows as the encoding gives them back, and sums exactly."""
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
    x = np.abs(drawn(sum(counts), 24))  # of one sign, so that the router chooses alike before and after
    rows = Rows.of(counts, block.placement, capacity)
    plain = jax.jit(block.program(ScatterCombine(block.placement)))
    expected = collect(
        plain(block.parameters, spread(there_and_back(encoding, x), counts, capacity), rows), counts, capacity
    )
    for strategy in strategies:
        laid_out = spread(x, counts, capacity, fill=np.nan)
        got = collect(jax.jit(block.program(strategy))(block.parameters, laid_out, rows), counts, capacity)
        np.testing.assert_allclose(
            got,
            expected,
            rtol=1e-4,
            atol=1e-5 * np.abs(expected).max(axis=1, keepdims=True).max(),
            err_msg=str(strategy),
        )


@pytest.mark.parametrize("name", SMALL)
def test_numbers_too_small_for_a_scale_come_back_as_zero(name: str) -> None:
    x = np.full((1, 24), np.finfo(np.float32).tiny, np.float32)
    x[0, 1:] = 1e-41
    np.testing.assert_array_equal(there_and_back(as_encoding(name), x), 0)


@pytest.mark.parametrize("name", ["fp4", ["int8"]])
def test_strange_names(name: str) -> None:
    with pytest.raises(ConfigError, match="gather_dtype must be exact, float8_e4m3fn, int8, got"):
        as_encoding(name)
