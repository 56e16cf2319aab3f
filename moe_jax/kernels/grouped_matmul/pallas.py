"""Grouped matmuls on GPUs, by kernels whose programs each compute a tile of one group's rows.

    M  rows, group after group     G  groups     D  inputs     F  outputs     B  rows of a tile     T  tiles, at most

Written for Pallas' Triton backend, which serves every NVIDIA GPU since Ampere, every dtype and size, and needs no GPU
to be compiled for one. Later versions of JAX mean to move it to a package of its own (`jax_triton`). JAX's own kernel
for Hopper (`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`) takes two-byte numbers and sizes that divide only, and
XLA did not finish compiling a decode step with it within four minutes (jax 0.10.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from moe_jax.config import WeightDtype
from moe_jax.kernels.quantized import QuantizedWeight
from moe_jax.kernels.stacked_weight import StackedWeight
from moe_jax.sharding.collectives import vary_alike

SMALLEST_TILE, LARGEST_TILE = 16, 64
"""Of rows; the tensor cores multiply no fewer than 16."""
OUTPUTS, INPUTS = 128, 64
"""Of a tile; the inputs are those of one step of its loop."""


@dataclass(frozen=True)
class PallasGroupedMatmul:
    """Each tile of rows reads its group's weights once, straight from where they lie; nothing is expanded or sorted.
    Rows beyond the groups cost nothing and are not written."""

    expected: int = 1
    """One row in so many is thought to belong to a group."""
    interpret: bool = False
    """Run the kernels step by step on any device: slow, for tests."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        """Weights in eight bits are converted tile by tile, and scales applied to the products."""
        (count, inputs), (_, groups, _, outputs) = rows.shape, weights.stack.shape
        size = tile_rows(count // self.expected, groups)
        most = count // size + min(groups, count)
        kernel = partial(_product, size=size, inputs=inputs, outputs=outputs)
        arrays = jax.tree.leaves(weights.stack)
        if isinstance(stack := weights.stack, QuantizedWeight):
            block = inputs // stack.scales.shape[2]
            step = INPUTS if block == inputs else math.gcd(INPUTS, block)
            kernel = partial(kernel, kind=stack.kind, block=block, step=step)
        grid, layer = (most, pl.cdiv(outputs, OUTPUTS)), vary_alike(weights.layer[None], rows)[0]
        return self._call(kernel, grid, (count, outputs), rows, *_spans(sizes, size, most), layer, rows, *arrays)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        inputs, outputs = rows.shape[1], grad.shape[1]
        ends = jnp.cumsum(sizes)
        kernel = partial(_outer, inputs=inputs, outputs=outputs)
        grid = (len(sizes), pl.cdiv(inputs, INPUTS), pl.cdiv(outputs, OUTPUTS))
        return self._call(kernel, grid, (len(sizes), inputs, outputs), grad, ends - sizes, ends, rows, grad)

    def _call(self, kernel: Any, grid: tuple[int, ...], shape: tuple[int, ...], like: Array, *args: Array) -> Array:
        out = jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
        params = triton.CompilerParams(num_warps=4, num_stages=3)
        return pl.pallas_call(kernel, out, grid=grid, interpret=self.interpret, compiler_params=params)(*args)


def tile_rows(rows: int, groups: int) -> int:
    """A power of two near half of an even share: of the last tile of each group, half is idle."""
    half = max(rows // groups // 2, 1)
    return min(max(1 << (half - 1).bit_length(), SMALLEST_TILE), LARGEST_TILE)


def _spans(
    sizes: Int32[Array, "G"], size: int, most: int
) -> tuple[Int32[Array, "T"], Int32[Array, "T"], Int32[Array, "T"]]:
    """Of each tile its group, its first row, and the row after its last; no rows for a tile beyond the last."""
    ends, tiles_of = jnp.cumsum(sizes), (sizes + size - 1) // size
    tile_ends, tile = jnp.cumsum(tiles_of), jnp.arange(most)
    group = jnp.minimum(jnp.sum(tile_ends <= tile[:, None], axis=1), len(sizes) - 1)
    first = ends[group] - sizes[group] + (tile - tile_ends[group] + tiles_of[group]) * size
    return group, first, jnp.minimum(first + size, ends[group])


def _product(
    groups: Any,
    firsts: Any,
    ends: Any,
    layer: Any,
    rows: Any,
    weights: Any,
    *refs: Any,
    size: int,
    inputs: int,
    outputs: int,
    kind: WeightDtype = WeightDtype.EXACT,
    block: int = 1,
    step: int = INPUTS,
) -> None:
    """One tile of the products: `size` rows of one group, and OUTPUTS columns.

    Weights in eight bits, of a `kind`, are followed by their scales, one for each `block` of inputs, into which a
    `step` falls whole.
    """
    *scales, out = refs
    width = max(step, SMALLEST_TILE)
    tile, column = pl.program_id(0), pl.program_id(1) * OUTPUTS
    group, first, end = groups[tile], firsts[tile], ends[tile]
    own = first + jnp.arange(size) < end
    columns = column + jnp.arange(OUTPUTS) < outputs

    @pl.when(first < end)
    def compute() -> None:
        def add(number: Array, total: Array) -> Array:
            at = number * step
            within = (jnp.arange(width) < step) & (at + jnp.arange(width) < inputs)
            x = _load(rows.at[pl.ds(first, size), pl.ds(at, width)], own, within)
            w = _load(weights.at[layer[0], group, pl.ds(at, width), pl.ds(column, OUTPUTS)], within, columns)
            part = jnp.dot(x, _converted(w, kind, x.dtype), preferred_element_type=jnp.float32)
            for of_blocks in scales:
                part *= _row(of_blocks.at[layer[0], group, at // block, pl.ds(column, OUTPUTS)], columns)
            return total + part

        total = lax.fori_loop(0, pl.cdiv(inputs, step), add, jnp.zeros((size, OUTPUTS), jnp.float32))
        _store(out.at[pl.ds(first, size), pl.ds(column, OUTPUTS)], total, own, columns)


def _outer(starts: Any, ends: Any, rows: Any, grad: Any, out: Any, **sizes: int) -> None:
    """One tile of the sums: of one group, INPUTS by OUTPUTS."""
    group, at, column = pl.program_id(0), pl.program_id(1) * INPUTS, pl.program_id(2) * OUTPUTS
    start, end = starts[group], ends[group]
    within = at + jnp.arange(INPUTS) < sizes["inputs"]
    columns = column + jnp.arange(OUTPUTS) < sizes["outputs"]

    def add(step: Array, total: Array) -> Array:
        first = start + step * LARGEST_TILE
        own = first + jnp.arange(LARGEST_TILE) < end
        x = _load(rows.at[pl.ds(first, LARGEST_TILE), pl.ds(at, INPUTS)], own, within)
        y = _load(grad.at[pl.ds(first, LARGEST_TILE), pl.ds(column, OUTPUTS)], own, columns)
        return total + jnp.dot(x.T, y, preferred_element_type=jnp.float32)

    steps = pl.cdiv(end - start, LARGEST_TILE)
    total = lax.fori_loop(0, steps, add, jnp.zeros((INPUTS, OUTPUTS), jnp.float32))
    _store(out.at[group, pl.ds(at, INPUTS), pl.ds(column, OUTPUTS)], total, within, columns)


def _load(part: Any, first: Array, second: Array) -> Array:
    """A rectangle of an array, zero where either dimension's mask is off."""
    zero = 0 if jnp.issubdtype(part.dtype, jnp.integer) else 0.0
    return triton.load(part, mask=first[:, None] & second[None, :], other=zero)


def _converted(weights: Array, kind: WeightDtype, dtype: Any) -> Array:
    """Triton converts float8_e4m3fn on GPUs since Hopper only, but its bits are those of a float16 with fewer: a sign,
    four of the five of the exponent, whose zero is 8 less, and three of the ten after it."""
    if kind is not WeightDtype.FLOAT8:
        return weights.astype(dtype)
    bits = weights.astype(jnp.int16)
    half = lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return (half.astype(jnp.float32) * 2**8).astype(dtype)


def _row(part: Any, mask: Array) -> Array:
    return triton.load(part, mask=mask, other=0.0)[None, :]


def _store(part: Any, value: Array, first: Array, second: Array) -> None:
    triton.store(part, value.astype(part.dtype), mask=first[:, None] & second[None, :])
