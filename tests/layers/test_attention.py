"""KV caches, and attention over them against plain softmax attention over whole sequences."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import QueryScalingConfig, RopeConfig, Window
from moe_jax.kernels.attention import causal_mask, first_position, grouped_query_attention
from moe_jax.kernels.forward_batch import ForwardBatch, PageTable, QueryLayout
from moe_jax.kernels.kv_cache import UNWRITTEN, AttentionTile, CachedKV, KVBlock, PagedKV, PagedKVCache, Uncached
from moe_jax.kernels.query_scaling import query_scale
from moe_jax.kernels.rope import Rotary
from moe_jax.sharding import Rows

SEGMENTS, KV_HEADS, HEADS, WIDTH, PAGE, PAGES, BLOCK = 3, 2, 4, 4, 2, 7, 8
ONE, TWO = QueryLayout(1, 1), QueryLayout(2, 2)


def batch(window: int | None = None) -> ForwardBatch:
    """Segments of a step, and two pad rows.

    Segment 0 decodes position 3, with pages 5 and 1; segment 1 has no rows; segment 2 is positions 5 and 6, with pages
    0 and 4 from position 4 on.
    """
    ints = {
        "tokens": [0] * 5,
        "segments": [0, 2, 2, SEGMENTS, SEGMENTS],
        "positions": [3, 5, 6, 0, 0],
        "starts": [0, 0, 1],
        "lengths": [1, 0, 2],
    }
    table = PageTable(jnp.array([[5, 1], [6, 6], [0, 4]]), jnp.array([0, 0, 4]), window)
    arrays: dict[str, Any] = {name: jnp.array(values) for name, values in ints.items()}
    return ForwardBatch(**arrays, tables=(table,), rows=Rows.full(5), layouts=(ONE, TWO))


def test_rows_to_query_layouts_and_back() -> None:
    forward_batch, rows = batch(), jnp.arange(5) + 10
    layouts = [forward_batch.to_padded(rows, layout) for layout in forward_batch.layouts]
    assert layouts[0].tolist() == [[10]]
    assert layouts[1][1].tolist() == [11, 12]
    assert forward_batch.to_rows(layouts)[:3].tolist() == [10, 11, 12]


def test_the_cache_writes_real_rows_only() -> None:
    forward_batch, shape = batch(), (2, KV_HEADS, PAGES, PAGE, WIDTH)
    cache = PagedKVCache(jnp.zeros(shape), jnp.zeros(shape))
    rows = jnp.ones((5, KV_HEADS, WIDTH)) * jnp.array([1, 2, 3, jnp.nan, jnp.nan])[:, None, None]
    _, after = cache.write(jnp.array(1), rows, -rows, forward_batch, None)
    expected = np.zeros(shape)
    expected[1, :, 1, 1], expected[1, :, 0, 1], expected[1, :, 4, 0] = 1, 2, 3
    np.testing.assert_array_equal(after.keys, expected)
    np.testing.assert_array_equal(after.values, -expected)


def test_a_segment_attends_to_its_own_pages_and_to_nothing_left_in_them() -> None:
    """Pages that were given back may hold anything, NaN included."""
    shape = (1, KV_HEADS, PAGES, PAGE, WIDTH)
    stale = jnp.full(shape, jnp.nan).at[:, :, 0, 0].set(9).at[:, :, 5].set(8).at[:, :, 1, 0].set(7)
    rows = jnp.ones((5, KV_HEADS, WIDTH)) * jnp.arange(1.0, 6)[:, None, None]
    view, _ = PagedKVCache(stale, stale).write(jnp.array(0), rows, rows, batch(), None)
    decoding, prompts = (whole(view(layout)) for layout in (ONE, TWO))
    assert decoding.positions.tolist() == [[0, 1, 2, 3]]
    assert decoding.values[1, 0, :, 2].tolist() == [8, 8, 7, 1]
    assert prompts.positions[1].tolist() == [4, 5, 6, UNWRITTEN]
    assert prompts.values[0, 1, :, 0].tolist() == [9, 2, 3, 0]
    assert prompts.keys[0, 1, :3, 0].tolist() == [9, 2, 3]


def test_layers_with_a_window_have_a_table_of_their_own() -> None:
    forward_batch = replace(batch(), tables=(*batch().tables, replace(batch(8).tables[0], firsts=jnp.array([2, 0, 4]))))
    cache = PagedKVCache(*jnp.zeros((2, 1, KV_HEADS, PAGES, PAGE, WIDTH)))
    rows = jnp.ones((5, KV_HEADS, WIDTH))
    _, after = cache.write(jnp.array(0), rows, rows, forward_batch, 8)
    assert after.keys[0, 0, 5, :, 0].tolist() == [0, 1], "position 3 is the second of a page that begins at 2"


def test_without_a_cache_rows_attend_to_their_own_step() -> None:
    rows = jnp.arange(5.0)[:, None, None] * jnp.ones((5, KV_HEADS, WIDTH))
    view, _ = Uncached().write(jnp.array(0), rows, rows, batch(), None)
    block = whole(view(TWO))
    assert block.keys.shape == (KV_HEADS, 2, 2, WIDTH)
    assert block.values[:, 1, :, 0].tolist() == [[1, 2], [1, 2]]
    assert block.positions.tolist() == [[UNWRITTEN, UNWRITTEN], [5, 6]]


def whole(cached: CachedKV) -> KVBlock:
    """Read all keys and values in one block."""
    return cached.fold(lambda block, _: block, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "tile",
    [None, AttentionTile(6, BLOCK), AttentionTile(5, BLOCK), AttentionTile(4, BLOCK), AttentionTile(2, BLOCK)],
    ids=["at_once", "pages", "all_used_segments", "overlapping_segments", "segments"],
)
@pytest.mark.parametrize("sinks", [None, jnp.array([-1.0, 0.5, 2, 9])], ids=["", "sinks"])
def test_grouped_query_attention_equals_softmax_attention(tile: AttentionTile | None, sinks: jax.Array | None) -> None:
    """Segments end in the first block of pages, at its end, and in the third; some have no rows."""
    ends, chunk, pages = jnp.array([3, BLOCK * PAGE, 0, 2 * BLOCK * PAGE + 5, 9, 0]), 2, 3 * BLOCK - 1
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    query, keys = draw(0, len(ends), chunk, HEADS, WIDTH), draw(1, 2, KV_HEADS, 150, PAGE, WIDTH)
    values = draw(2, 2, KV_HEADS, 150, PAGE, WIDTH).at[:, :, 149].set(jnp.nan)
    table = jax.random.permutation(jax.random.key(3), 149)[: len(ends) * pages].reshape(-1, pages)
    table = jnp.where(jnp.arange(pages) * PAGE < ends[:, None], table, 149)
    cached = PagedKV(PagedKVCache(keys, values, tile), jnp.array(1), table, jnp.zeros(len(ends), int), ends)
    positions = ends[:, None] - jnp.array([2, 1])

    def attend(cached: CachedKV, query: jax.Array, positions: jax.Array) -> jax.Array:
        return grouped_query_attention(query, cached, causal_mask(positions), WIDTH**-0.5, sinks)

    got = jax.jit(lambda: cached.map_segments(attend, query, positions))()
    for segment, row, head in product(np.flatnonzero(ends), range(chunk), range(HEADS)):
        kv_head, length = head // (HEADS // KV_HEADS), int(ends[segment]) - 1 + row
        segment_keys, segment_values = (
            np.asarray(part[1, kv_head, table[segment]]).reshape(-1, WIDTH)[:length] for part in (keys, values)
        )
        scores = segment_keys @ np.asarray(query[segment, row, head]) / np.sqrt(WIDTH)
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
        np.testing.assert_allclose(got[segment, row, head], weights / total @ segment_values, atol=1e-5)
    np.testing.assert_array_equal(got[ends == 0], 0)


def test_windows_slide_and_chunks_follow_each_other() -> None:
    rows = jnp.arange(9)
    assert first_position(rows, 4, Window.SLIDING).tolist() == [-3, -2, -1, 0, 1, 2, 3, 4, 5]
    assert first_position(rows, 4, Window.CHUNKED).tolist() == [0, 0, 0, 0, 4, 4, 4, 4, 8]


def test_queries_grow_at_each_interval() -> None:
    scale = query_scale(QueryScalingConfig(interval=3, strength=0.5), jnp.array([0, 1, 2, 4, 5]))
    np.testing.assert_allclose(scale[:, 0, 0], 1 + 0.5 * np.log([1, 1, 2, 2, 3]), rtol=1e-6)


@pytest.mark.parametrize("shift", [1, 100])
def test_products_of_rotated_vectors_depend_on_their_distance_only(shift: int) -> None:
    x, y = (jax.random.normal(jax.random.key(seed), (1, 1, 8)) for seed in (0, 1))

    rotary = Rotary(RopeConfig(100.0), head_dim=8)

    def product(first: int, second: int) -> jax.Array:
        return jnp.sum(rotary(x, rotary.at(jnp.array([first]))) * rotary(y, rotary.at(jnp.array([second]))))

    np.testing.assert_allclose(product(5, 3), product(5 + shift, 3 + shift), rtol=1e-4)
    assert abs(product(5, 3) - product(6, 3)) > 1e-2
