"""Collectives over mesh axes, and `PartialSum`, the type that makes each sum over devices happen exactly once.

Collectives are called in this file only. A `PartialSum` is one device's part of a sum. It is not an array: it can be
added to another partial sum over the same axes, and `reduce` turns it into an array; nothing else accepts it. So a sum
over devices cannot be forgotten (a `PartialSum` cannot stand in for an array) or done twice (`reduce` accepts nothing
else). JAX tracks the same fact on the wrapped value (`unreduced` in its manual axis type, under
`shard_map(check_vma=True)`), so JAX refuses code that unwraps the value.

Layouts are written as JAX prints them: `[T, D] {V:expert}` varies over `expert`, `{U:expert}` is unreduced over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Int32, Shaped

from moe_jax.errors import PlacementError, ReductionError

Axes = tuple[str, ...]
EAGER_SHARD_MAP_ERRORS = ("unreduced in out_specs", "Unreduced axes can only refer to mesh axes")
"""Words of JAX's error for an unreduced value in a `shard_map` that is not compiled: of 0.10.2, and of 0.12."""
Tree = TypeVar("Tree")


class PartialSum:
    """One device's part of a sum over `axes`, made by `partial_sum` and summed by `reduce` or `reduce_exchanged`.

    Along the axes in `exchanged`, each device holds outputs of the rows that were sent to it, so the devices hold
    different rows; `reduce_exchanged` sends them back before it sums. Along the other axes all devices hold the same
    rows.
    """

    def __init__(self, value: Array, axes: Axes, exchanged: Axes = ()) -> None:
        self._value = value
        self.axes = axes
        self.exchanged = exchanged

    @property
    def shape(self) -> tuple[int, ...]:
        return self._value.shape

    def __add__(self, other: object) -> PartialSum:
        """Add two partial sums over the same axes, such as those of routed and shared experts."""
        if not isinstance(other, PartialSum):
            raise ReductionError(
                f"adding an array to a partial sum over {self.axes} would add it once per device: reduce the partial "
                "sum first (Combine.combine or ResidualLayout.sum_heads), then add"
            )
        if self.axes != other.axes:
            raise ReductionError(
                f"cannot add partial sums over different axes, {self.axes} and {other.axes}: reduce each, then add"
            )
        if self.exchanged != other.exchanged:
            raise ReductionError(
                "cannot add partial sums of different rows, gathered and dispatched: combine each, then add"
            )
        return PartialSum(self._value + other._value, self.axes, self.exchanged)

    __radd__ = __add__

    def split(self, rows: int) -> tuple[PartialSum, PartialSum]:
        """Split into the first `rows` rows and the rest, to reduce them in different ways."""
        first, rest = self._value[:rows], self._value[rows:]
        return PartialSum(first, self.axes, self.exchanged), PartialSum(rest, self.axes, self.exchanged)

    def _refuse(self, *_: Any) -> NoReturn:
        raise ReductionError(
            f"a partial sum over {self.axes} was used as if it were the sum: reduce it first "
            "(Combine.combine for a feed-forward, ResidualLayout.sum_heads for attention)"
        )

    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __pow__ = __rpow__ = __floordiv__ = __mod__ = __abs__ = __float__ = __int__ = __bool__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __iter__ = __len__ = __jax_array__ = __array__ = _refuse
    __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


# A value is flattened when it leaves a traced function (as a scan's carry or a result of shard_map or jit). A partial
# sum that leaves one was never reduced, so flattening is an error.
jax.tree_util.register_pytree_node(PartialSum, PartialSum._refuse, lambda _, parts: PartialSum(*parts))


def partial_sum(value: Shaped[Array, "..."], axes: Axes, *, exchanged: Axes = ()) -> PartialSum:
    """Declare `value` to be this device's part of a sum over the devices of `axes`: `{V:axes} -> {U:axes}`.

    If rows were exchanged, JAX cannot type the value as unreduced, and only the `PartialSum` records it.

    Args:
      exchanged: axes along which each device holds different rows (see `PartialSum`).

    Raises:
      ReductionError: `value` is the same on all devices of one of the axes, so summing would multiply it.
      PlacementError: called outside of the mesh, or in a `shard_map` that is not compiled.
    """
    if isinstance(value, PartialSum):
        raise ReductionError(f"this is a partial sum already, over {value.axes}: use it as it is")
    _require_mesh(axes)
    if same := set(axes) - _varying(value):
        raise ReductionError(
            f"a value that is the same on every device of {sorted(same)} is not a partial sum over them: "
            "it was summed already, or computed from replicated inputs only"
        )
    return PartialSum(value if exchanged else _unreduced(value, axes), axes, exchanged)


def reduce(partial: PartialSum, *, scatter_over: Axes = (), sum_over: Axes = ()) -> Array:
    """Sum a partial sum over its devices: `[n*T, D] {U:scatter,sum} -> [T, D] {V:scatter}`.

    Args:
      scatter_over: axes along which each device keeps its own part of the leading dimension (`psum_scatter`).
      sum_over: axes along which every device keeps all rows (`psum`).

    Raises:
      ReductionError: `partial` is not a partial sum, or is one over other axes.
    """
    if not isinstance(partial, PartialSum):
        raise ReductionError(
            f"reducing an array that is not a partial sum would multiply it by {_product(scatter_over + sum_over)}, "
            f"the devices on {scatter_over + sum_over}: it was reduced already, or never declared with partial_sum"
        )
    if set(partial.axes) != set(scatter_over) | set(sum_over):
        raise ReductionError(
            f"a partial sum over {partial.axes} must be reduced over exactly these axes, not {scatter_over + sum_over}"
        )
    if partial.exchanged:
        raise ReductionError(
            "a partial sum of dispatched rows must go back to their owners: pass it to the combine of the strategy "
            "that dispatched them"
        )
    value = partial._value
    if scatter_over:
        value = lax.psum_scatter(value, scatter_over, tiled=True)
    if sum_over:
        value = lax.psum(value, sum_over)
    return value


def exchange(
    blocks: Shaped[Array, "n C ..."],
    send_sizes: Int32[Array, "n"],
    recv_sizes: Int32[Array, "n"],
    axes: Axes,
    *,
    ragged: bool,
) -> Array:
    """Send block i to device i along `axes`; block i of the result comes from device i: `[n, C, ...] -> [n, C, ...]`.

    Args:
      send_sizes: number of leading rows to send of each block.
      recv_sizes: number of leading rows to receive from each device.
      ragged: send only those rows and leave the others zero (`ragged_all_to_all`); otherwise send all rows.
    """
    if not axes:
        return blocks
    _require_mesh(axes)
    if not ragged:
        return lax.all_to_all(blocks, axes, 0, 0, tiled=True)
    devices, rows, *_ = blocks.shape
    flat = blocks.reshape(devices * rows, -1)
    input_offsets = jnp.arange(devices, dtype=jnp.int32) * rows
    output_offsets = jnp.full(devices, rows, jnp.int32) * axis_index(axes)
    sizes = vary_alike(input_offsets, send_sizes, output_offsets, recv_sizes)
    return lax.ragged_all_to_all(flat, jnp.zeros_like(flat), *sizes, axis_name=axes).reshape(blocks.shape)


def reduce_exchanged(
    partial: PartialSum, send_back: Callable[[Array], Array], *, exchanged: Axes, sum_over: Axes
) -> Array:
    """Sum a partial sum of dispatched rows over its devices: `[n*C, D] -> [T, D] {V:exchanged}`.

    Args:
      send_back: sends the rows back to their owners, and sums each owner's rows.
      exchanged: axes along which `send_back` does so.
      sum_over: axes along which every device keeps all rows.

    Raises:
      ReductionError: `partial` is not a partial sum of rows exchanged along these axes.
    """
    if not isinstance(partial, PartialSum) or partial.exchanged != exchanged:
        raise ReductionError(
            f"only a partial sum of rows that were dispatched along {exchanged} can be sent back: make it with the "
            "partial_sum method of the value that combine.dispatch returned"
        )
    assert set(partial.axes) == set(exchanged) | set(sum_over), "made for these axes by the same strategy"
    return reduce(partial_sum(send_back(partial._value), sum_over), sum_over=sum_over)


def sum_devices(tree: Tree, axes: Axes) -> Tree:
    """Sum each array of a tree over the devices of `axes`: `[...] {V:axes} -> [...]`."""
    return jax.tree.map(lambda value: reduce(partial_sum(value, axes), sum_over=axes), tree)


def all_gather(value: Shaped[Array, "..."], axes: Axes, *, dim: int = 0) -> Array:
    """Concatenate the parts of all devices of `axes` along `dim`: `[T, D] {V:axes} -> [n*T, D]`."""
    if isinstance(value, PartialSum):
        raise ReductionError(f"gathering parts of a sum over {value.axes}: reduce it first")
    _require_mesh(axes)
    return lax.all_gather(value, axes, axis=dim, tiled=True) if axes else value


def all_gather_same(value: Shaped[Array, "..."], axes: Axes, *, dim: int = 0) -> Array:
    """`all_gather` with a result that JAX types as equal on every device of `axes`."""
    _require_mesh(axes)
    return lax.all_gather(value, axes, axis=dim, tiled=True, to="invarying") if axes else value


def axis_index(axes: Axes) -> Array | int:
    """Index of this device along `axes`; the first axis is the slowest."""
    _require_mesh(axes)
    return lax.axis_index(axes) if axes else 0


def vary_alike(*values: Shaped[Array, "..."]) -> tuple[Array, ...]:
    """Retype values to vary over every axis that any of them varies over, as loops and custom gradients need."""
    everywhere = frozenset().union(*map(_varying, values))
    return tuple(
        lax.pcast(value, tuple(missing), to="varying") if (missing := everywhere - _varying(value)) else value
        for value in values
    )


def argsort(keys: Shaped[Array, "M"]) -> Int32[Array, "M"]:
    """Stable `jnp.argsort`, typed to vary over the axes of its keys.

    `jnp.argsort` itself (at least in JAX 0.10.2 to 0.12.0) is typed as equal on every device, and the gradient of an
    array that it indexes then misses a sum.
    """
    return vary_alike(jnp.argsort(keys, stable=True), keys)[0]


def _unreduced(value: Array, axes: Axes) -> Array:
    if not axes:
        return value
    try:
        return lax.pcast(value, axes, to="unreduced")
    except ValueError as error:
        if not any(words in str(error) for words in EAGER_SHARD_MAP_ERRORS):
            raise
        raise PlacementError(
            "a layer was called in a jax.shard_map that is not compiled, in which JAX cannot hold partial sums: "
            "write jax.jit(jax.shard_map(...))"
        ) from error


def _require_mesh(axes: Axes) -> None:
    """Raise `PlacementError` unless this code runs in a `shard_map` over `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Manual]
    if missing := [axis for axis in axes if axis not in mapped]:
        raise PlacementError(
            f"a layer was called outside of its mesh: it needs the axes {', '.join(missing)}. For MoE and DenseMLP "
            "write `y, load = moe_jax.layers.on_mesh(layer, placement)(x)`; run other layers in "
            "`jax.jit(jax.shard_map(..., mesh=placement.mesh))`, with their parameters split by "
            "`moe_jax.layers.specs(layer, placement)`"
        )


def _varying(value: Array) -> frozenset[str]:
    return jax.typeof(value).manual_axis_type.varying


def _product(axes: Axes) -> int:
    return math.prod(lax.axis_size(axis) for axis in axes)
