"""Attention over a cache, against plain softmax attention over whole sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import Packing
from moe_jax.layers.attention import attend
from moe_jax.layers.cache import KVCache, Uncached
from moe_jax.layers.rope import rotate

SLOTS, KV_HEADS, HEADS, WIDTH, POSITIONS = 3, 2, 4, 4, 8


def packing() -> Packing:
    """Slot 2 has positions 1 and 2, slot 0 position 3, slot 1 nothing; two pad rows."""
    ints = {
        "slots": [2, 2, 0, SLOTS, SLOTS],
        "positions": [1, 2, 3, 0, 0],
        "starts": [2, 0, 0],
        "lengths": [1, 0, 2],
    }
    return Packing(**{name: jnp.array(values) for name, values in ints.items()}, chunk=2)


def test_rows_to_grid_and_back() -> None:
    packed, rows = packing(), jnp.arange(5) + 10
    grid = packed.to_grid(rows)
    assert grid[2].tolist() == [10, 11]
    assert grid[0, 0] == 12
    assert packed.to_rows(grid)[:3].tolist() == [10, 11, 12]
    assert packed.last.tolist() == [2, 0, 1]


def test_the_cache_takes_real_rows_only() -> None:
    packed, shape = packing(), (2, SLOTS, KV_HEADS, POSITIONS, WIDTH)
    cache = KVCache(jnp.zeros(shape), jnp.zeros(shape))
    rows = jnp.ones((5, KV_HEADS, WIDTH)) * jnp.array([1, 2, 3, jnp.nan, jnp.nan])[:, None, None]
    keys, values, after = cache.write(jnp.array(1), rows, -rows, packed)
    expected = np.zeros(shape)
    expected[1, 2, :, 1], expected[1, 2, :, 2], expected[1, 0, :, 3] = 1, 2, 3
    np.testing.assert_array_equal(after.keys, expected)
    np.testing.assert_array_equal(after.values, -expected)
    np.testing.assert_array_equal(keys, expected[1])
    np.testing.assert_array_equal(values, -expected[1])


def test_without_a_cache_only_this_step_is_seen() -> None:
    rows = jnp.arange(5.0)[:, None, None] * jnp.ones((5, KV_HEADS, WIDTH))
    keys, _, again = Uncached(4).write(jnp.array(0), rows, rows, packing())
    assert keys.shape == (SLOTS, KV_HEADS, 4, WIDTH)
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert again == Uncached(4)


def test_attend_is_grouped_softmax_attention() -> None:
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    query, keys = draw(0, SLOTS, 2, HEADS, WIDTH), draw(1, SLOTS, KV_HEADS, POSITIONS, WIDTH)
    values = draw(2, SLOTS, KV_HEADS, POSITIONS, WIDTH)
    seen = jnp.arange(POSITIONS) <= jnp.array([[3, 4], [0, 1], [7, 7]])[..., None]
    got = attend(query, keys, values, seen)
    for slot, chunk, head in np.ndindex(SLOTS, 2, HEADS):
        kv = head // (HEADS // KV_HEADS)
        upto = int(seen[slot, chunk].sum())
        scores = np.asarray(keys[slot, kv, :upto] @ query[slot, chunk, head]) / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        expected = weights / weights.sum() @ np.asarray(values[slot, kv, :upto])
        np.testing.assert_allclose(got[slot, chunk, head], expected, atol=1e-5)


@pytest.mark.parametrize("shift", [1, 100])
def test_rotated_products_depend_on_distance_only(shift: int) -> None:
    x, y = (jax.random.normal(jax.random.key(seed), (1, 1, 8)) for seed in (0, 1))

    def product(first: int, second: int) -> jax.Array:
        return jnp.sum(rotate(x, jnp.array([first]), 100.0) * rotate(y, jnp.array([second]), 100.0))

    np.testing.assert_allclose(product(5, 3), product(5 + shift, 3 + shift), rtol=1e-4)
    assert abs(product(5, 3) - product(6, 3)) > 1e-2
