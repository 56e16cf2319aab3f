"""Grouped matmuls on GPUs: a Pallas kernel whose programs each compute a tile of one group's rows.

    M  rows, group after group     G  groups     D  inputs     F  outputs
    B  rows of a tile              T  row tiles, at most

The kernel is written for Pallas' Triton backend, which serves every NVIDIA GPU since Ampere, takes every dtype and
size, and compiles without a GPU. JAX means to move that backend to a package of its own (`jax_triton`). JAX's kernel
for Hopper (`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu`) takes two-byte dtypes and sizes that divide only, and XLA
did not compile a decode step with it within four minutes (jax 0.10.2).
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

MIN_TILE_ROWS, MAX_TILE_ROWS = 16, 64
"""Limits of the rows of a tile: tensor cores multiply at least 16."""
TILE_OUTPUTS, TILE_INPUTS = 128, 64
"""Outputs of a tile, and inputs that one step of a program's loop multiplies."""


@dataclass(frozen=True)
class PallasGroupedMatmul:
    """Triton kernels that read a group's weights once for each tile of rows, straight from the stack of layers.

    Nothing is expanded or sorted. Rows beyond the groups cost nothing, and their outputs are not written.
    """

    shards: int = 1
    """Number of devices that the groups are split over, as in `grouped_matmul_on`."""
    interpret: bool = False
    """Interpret the kernels on any device: slow, for tests."""

    def product(
        self, rows: Float[Array, "M D"], weights: StackedWeight, sizes: Int32[Array, "G"]
    ) -> Float[Array, "M F"]:
        """Weights in eight bits are converted tile by tile; their scales multiply the products."""
        (count, inputs), (_, groups, _, outputs) = rows.shape, weights.stack.shape
        size = tile_rows(count // self.shards, groups)
        max_tiles = count // size + min(groups, count)
        tile = _Tile(size, inputs, outputs)
        if isinstance(stack := weights.stack, QuantizedWeight):
            block = inputs // stack.scales.shape[2]
            tile = _Tile(
                size,
                inputs,
                outputs,
                stack.kind,
                block,
                TILE_INPUTS if block == inputs else math.gcd(TILE_INPUTS, block),
            )
        grid, layer = (max_tiles, pl.cdiv(outputs, TILE_OUTPUTS)), vary_alike(weights.layer[None], rows)[0]
        arrays = *_tile_metadata(sizes, size, max_tiles), layer, rows, *jax.tree.leaves(weights.stack)
        return self._call(partial(_product_kernel, tile=tile), grid, (count, outputs), rows, *arrays)

    def outer(
        self, rows: Float[Array, "M D"], grad: Float[Array, "M F"], sizes: Int32[Array, "G"]
    ) -> Float[Array, "G D F"]:
        inputs, outputs = rows.shape[1], grad.shape[1]
        ends = jnp.cumsum(sizes)
        kernel = partial(_outer_kernel, inputs=inputs, outputs=outputs)
        grid = (len(sizes), pl.cdiv(inputs, TILE_INPUTS), pl.cdiv(outputs, TILE_OUTPUTS))
        return self._call(kernel, grid, (len(sizes), inputs, outputs), grad, ends - sizes, ends, rows, grad)

    def _call(self, kernel: Any, grid: tuple[int, ...], shape: tuple[int, ...], like: Array, *args: Array) -> Array:
        out = jax.ShapeDtypeStruct(shape, like.dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
        params = triton.CompilerParams(num_warps=4, num_stages=3)
        return pl.pallas_call(kernel, out, grid=grid, interpret=self.interpret, compiler_params=params)(*args)


def tile_rows(rows: int, groups: int) -> int:
    """Choose the rows of a tile: a power of two near half of an even share, as half of a group's last tile is idle."""
    half = max(rows // groups // 2, 1)
    return min(max(1 << (half - 1).bit_length(), MIN_TILE_ROWS), MAX_TILE_ROWS)


@dataclass(frozen=True)
class _Tile:
    """Sizes of one program of the product kernel."""

    rows: int
    inputs: int
    """Inputs of the matrices (D)."""
    outputs: int
    """Outputs of the matrices (F)."""
    kind: WeightDtype = WeightDtype.EXACT
    scale_block: int = 1
    """Inputs that share a scale."""
    step: int = TILE_INPUTS
    """Inputs of one step of the loop; they share a scale."""


def _tile_metadata(
    sizes: Int32[Array, "G"], size: int, max_tiles: int
) -> tuple[Int32[Array, "T"], Int32[Array, "T"], Int32[Array, "T"]]:
    """Each row tile's group, first row, and end; a tile beyond the last has no rows."""
    ends, tiles_of = jnp.cumsum(sizes), (sizes + size - 1) // size
    tile_ends, tile = jnp.cumsum(tiles_of), jnp.arange(max_tiles)
    group = jnp.minimum(jnp.sum(tile_ends <= tile[:, None], axis=1), len(sizes) - 1)
    first = ends[group] - sizes[group] + (tile - tile_ends[group] + tiles_of[group]) * size
    return group, first, jnp.minimum(first + size, ends[group])


def _product_kernel(
    groups: Any, firsts: Any, ends: Any, layer: Any, rows: Any, weights: Any, *refs: Any, tile: _Tile
) -> None:
    """Compute one tile of the products: `tile.rows` rows of one group, and `TILE_OUTPUTS` outputs.

    `refs` are the scales of weights in eight bits, if these are, and the output.
    """
    *scales, out = refs
    width = max(tile.step, MIN_TILE_ROWS)
    row_tile, output = pl.program_id(0), pl.program_id(1) * TILE_OUTPUTS
    group, first, end = groups[row_tile], firsts[row_tile], ends[row_tile]
    row_mask = first + jnp.arange(tile.rows) < end
    output_mask = output + jnp.arange(TILE_OUTPUTS) < tile.outputs

    @pl.when(first < end)
    def compute() -> None:
        def add(step: Array, total: Array) -> Array:
            at = step * tile.step
            input_mask = (jnp.arange(width) < tile.step) & (at + jnp.arange(width) < tile.inputs)
            x = _load(rows.at[pl.ds(first, tile.rows), pl.ds(at, width)], row_mask, input_mask)
            w = _load(
                weights.at[layer[0], group, pl.ds(at, width), pl.ds(output, TILE_OUTPUTS)], input_mask, output_mask
            )
            part = jnp.dot(x, _converted(w, tile.kind, x.dtype), preferred_element_type=jnp.float32)
            for scale in scales:
                block = scale.at[layer[0], group, at // tile.scale_block, pl.ds(output, TILE_OUTPUTS)]
                part *= triton.load(block, mask=output_mask, other=0.0)[None, :]
            return total + part

        steps, zeros = pl.cdiv(tile.inputs, tile.step), jnp.zeros((tile.rows, TILE_OUTPUTS), jnp.float32)
        total = lax.fori_loop(0, steps, add, zeros)
        _store(out.at[pl.ds(first, tile.rows), pl.ds(output, TILE_OUTPUTS)], total, row_mask, output_mask)


def _outer_kernel(starts: Any, ends: Any, rows: Any, grad: Any, out: Any, *, inputs: int, outputs: int) -> None:
    """Compute one tile of the outer products of one group: `TILE_INPUTS` by `TILE_OUTPUTS`."""
    group, at, output = pl.program_id(0), pl.program_id(1) * TILE_INPUTS, pl.program_id(2) * TILE_OUTPUTS
    start, end = starts[group], ends[group]
    input_mask = at + jnp.arange(TILE_INPUTS) < inputs
    output_mask = output + jnp.arange(TILE_OUTPUTS) < outputs

    def add(step: Array, total: Array) -> Array:
        first = start + step * MAX_TILE_ROWS
        row_mask = first + jnp.arange(MAX_TILE_ROWS) < end
        x = _load(rows.at[pl.ds(first, MAX_TILE_ROWS), pl.ds(at, TILE_INPUTS)], row_mask, input_mask)
        y = _load(grad.at[pl.ds(first, MAX_TILE_ROWS), pl.ds(output, TILE_OUTPUTS)], row_mask, output_mask)
        return total + jnp.dot(x.T, y, preferred_element_type=jnp.float32)

    steps = pl.cdiv(end - start, MAX_TILE_ROWS)
    total = lax.fori_loop(0, steps, add, jnp.zeros((TILE_INPUTS, TILE_OUTPUTS), jnp.float32))
    _store(out.at[group, pl.ds(at, TILE_INPUTS), pl.ds(output, TILE_OUTPUTS)], total, input_mask, output_mask)


def _converted(weights: Array, kind: WeightDtype, dtype: Any) -> Array:
    """Convert a tile of weights to the dtype of the rows, without their scales.

    Triton converts float8_e4m3fn on GPUs since Hopper only. Its bits are those of a float16 with fewer: the sign, four
    of the five bits of the exponent, whose bias is 8 less, and three of the ten bits of the mantissa.
    """
    if kind is not WeightDtype.FLOAT8:
        return weights.astype(dtype)
    bits = weights.astype(jnp.int16)
    half = lax.bitcast_convert_type(((bits & 0x80) << 8) | ((bits & 0x7F) << 7), jnp.float16)
    return (half.astype(jnp.float32) * 2**8).astype(dtype)


def _load(block: Any, first_mask: Array, second_mask: Array) -> Array:
    """Load a rectangle of an array, zero where either dimension's mask is off."""
    zero = 0 if jnp.issubdtype(block.dtype, jnp.integer) else 0.0
    return triton.load(block, mask=first_mask[:, None] & second_mask[None, :], other=zero)


def _store(block: Any, value: Array, first_mask: Array, second_mask: Array) -> None:
    triton.store(block, value.astype(block.dtype), mask=first_mask[:, None] & second_mask[None, :])
