"""The only file that calls a collective, and the type that keeps sums honest.

A value that every device holds a part of, to be added up, is a `PartialSum`. It is no array: nothing can be computed
from it but its sum with another partial sum over the same axes, and `reduce`, which gives the array back. So a sum
over devices cannot be forgotten (a `PartialSum` fits nowhere an array does) nor done twice (`reduce` takes nothing
else). Below this, JAX tracks the same fact on the value itself (`unreduced` in its manual axis type, under
`shard_map(check_vma=True)`), so code that unwraps the value is refused by JAX.

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
Tree = TypeVar("Tree")


class PartialSum:
    """This device's part of a sum over `axes`. Made by `partial_sum`, ended by `reduce`, or by `reduce_exchanged` where
    along some of the axes (`exchanged`) the devices hold parts of the rows that each was sent, not of the same rows."""

    def __init__(self, value: Array, axes: Axes, exchanged: Axes = ()) -> None:
        self._value = value
        self.axes = axes
        self.exchanged = exchanged

    @property
    def shape(self) -> tuple[int, ...]:
        return self._value.shape

    def __add__(self, other: object) -> PartialSum:
        """Two partial sums over the same axes are one partial sum: a shared expert joins the routed ones."""
        if not isinstance(other, PartialSum):
            raise ReductionError(
                f"adding an array to a partial sum over {self.axes} would add it once per device: "
                "reduce the partial sum first (combine.combine or combine.sum_heads), then add"
            )
        if self.axes != other.axes:
            raise ReductionError(
                f"these partial sums are over different axes, {self.axes} and {other.axes}: reduce each"
            )
        if self.exchanged != other.exchanged:
            raise ReductionError("these are partial sums of different rows, gathered and dispatched: combine each")
        return PartialSum(self._value + other._value, self.axes, self.exchanged)

    __radd__ = __add__

    def split(self, rows: int) -> tuple[PartialSum, PartialSum]:
        """The first `rows` rows and the others, each to be reduced in its own way."""
        first, others = self._value[:rows], self._value[rows:]
        return PartialSum(first, self.axes, self.exchanged), PartialSum(others, self.axes, self.exchanged)

    def _refuse(self, *_: Any) -> NoReturn:
        raise ReductionError(
            f"a partial sum over {self.axes} was used as if it were the sum: "
            "reduce it first (combine.combine for a feed-forward, combine.sum_heads for attention)"
        )

    __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _refuse
    __neg__ = __pow__ = __rpow__ = __floordiv__ = __mod__ = __abs__ = __float__ = __int__ = __bool__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = __iter__ = __len__ = __jax_array__ = __array__ = _refuse
    __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


# Leaving a traced function (a scan's carry, the result of shard_map or jit) flattens the value: that is forgetting it.
jax.tree_util.register_pytree_node(PartialSum, PartialSum._refuse, lambda _, parts: PartialSum(*parts))


def partial_sum(value: Shaped[Array, "..."], axes: Axes, *, exchanged: Axes = ()) -> PartialSum:
    """Declare that the sum of `value` over the devices of `axes` is what is meant: `{V:axes} -> {U:axes}`.

    Where the rows were exchanged, JAX cannot know that value as unreduced, and only its wrapper tells.

    Raises:
      ReductionError: `value` is the same on all devices of one of the axes, so that summing it would multiply it.
      PlacementError: called outside of the mesh.
    """
    if isinstance(value, PartialSum):
        raise ReductionError(f"this is a partial sum already, over {value.axes}: pass it on as it is")
    _require_mesh(axes)
    if same := set(axes) - _varying(value):
        raise ReductionError(
            f"a value that is the same on every device of {sorted(same)} is no partial sum over them: "
            "it was summed already, or computed from replicated inputs only"
        )
    known_to_jax = axes and not exchanged
    return PartialSum(lax.pcast(value, axes, to="unreduced") if known_to_jax else value, axes, exchanged)


def reduce(partial: PartialSum, *, scatter_over: Axes = (), sum_over: Axes = ()) -> Array:
    """Add up a partial sum, once: `[n*T, D] {U:scatter,sum} -> [T, D] {V:scatter}`.

    Args:
      scatter_over: each device keeps its own part of the leading dimension, as `psum_scatter` gives it.
      sum_over: every device keeps the whole.

    Raises:
      ReductionError: not a partial sum, or one over other axes than these.
    """
    if not isinstance(partial, PartialSum):
        raise ReductionError(
            f"reducing an array that is no partial sum would multiply it by {_product(scatter_over + sum_over)}, the "
            f"devices on {scatter_over + sum_over}: it was reduced already, or never declared with partial_sum"
        )
    if set(partial.axes) != set(scatter_over) | set(sum_over):
        raise ReductionError(
            f"a partial sum over {partial.axes} must be reduced over exactly these axes, not {scatter_over + sum_over}"
        )
    if partial.exchanged:
        raise ReductionError("a partial sum of dispatched rows goes back to their owners: combine it as it came")
    value = partial._value
    if scatter_over:
        value = lax.psum_scatter(value, scatter_over, tiled=True)
    if sum_over:
        value = lax.psum(value, sum_over)
    return value


def exchange(
    blocks: Shaped[Array, "n C ..."],
    sending: Int32[Array, "n"],
    receiving: Int32[Array, "n"],
    axes: Axes,
    *,
    ragged: bool,
) -> Array:
    """Block i goes to device i along `axes`, and arrives at the place of its sender: `[n, C, ...] -> [n, C, ...]`.

    Args:
      sending: how many rows of each block, from its first on, matter.
      receiving: the same of the blocks that arrive.
      ragged: whether the devices can send only those rows; then the others arrive as zero, else all are sent.
    """
    if not axes:
        return blocks
    _require_mesh(axes)
    if not ragged:
        return lax.all_to_all(blocks, axes, 0, 0, tiled=True)
    devices, rows, *_ = blocks.shape
    flat = blocks.reshape(devices * rows, -1)
    firsts = jnp.arange(devices, dtype=jnp.int32) * rows
    places = jnp.full(devices, rows, jnp.int32) * axis_index(axes)
    firsts, places, sending, receiving = vary_alike(firsts, places, sending, receiving)
    sent = lax.ragged_all_to_all(flat, jnp.zeros_like(flat), firsts, sending, places, receiving, axis_name=axes)
    return sent.reshape(blocks.shape)


def reduce_exchanged(
    partial: PartialSum, send_back: Callable[[Array], Array], *, exchanged: Axes, sum_over: Axes
) -> Array:
    """Add up a partial sum of dispatched rows, once: `[n*C, D] -> [T, D] {V:exchanged}`.

    Args:
      send_back: exchanges the rows back to their owners, and adds up each owner's own.
      exchanged: the axes along which it does so.
      sum_over: every device keeps the whole.

    Raises:
      ReductionError: not a partial sum of rows exchanged along these axes.
    """
    if not isinstance(partial, PartialSum) or partial.exchanged != exchanged:
        raise ReductionError(
            f"only a partial sum of rows that were dispatched along {exchanged} can be sent back: make it with "
            "partial_sum of what combine.dispatch returned"
        )
    assert set(partial.axes) == set(exchanged) | set(sum_over), "made for these axes by the same strategy"
    return reduce(partial_sum(send_back(partial._value), sum_over), sum_over=sum_over)


def sum_devices(tree: Tree, axes: Axes) -> Tree:
    """Totals over the devices of `axes` of values of which each device has its own: `[...] {V:axes} -> [...]`."""
    return jax.tree.map(lambda value: reduce(partial_sum(value, axes), sum_over=axes), tree)


def all_gather(value: Shaped[Array, "..."], axes: Axes, *, dim: int = 0) -> Array:
    """The parts of all devices of `axes`, concatenated along `dim`: `[T, D] {V:axes} -> [n*T, D]`."""
    if isinstance(value, PartialSum):
        raise ReductionError(f"gathering parts of a sum over {value.axes}: reduce it first")
    _require_mesh(axes)
    return lax.all_gather(value, axes, axis=dim, tiled=True) if axes else value


def all_gather_same(value: Shaped[Array, "..."], axes: Axes, *, dim: int = 0) -> Array:
    """As `all_gather`, with the result typed as the same on every device of `axes`, as it is."""
    _require_mesh(axes)
    return lax.all_gather(value, axes, axis=dim, tiled=True, to="invarying") if axes else value


def axis_index(axes: Axes) -> Array | int:
    """This device's position along `axes`, the first of them the slowest."""
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
    """Stable `jnp.argsort`, typed to vary as its keys do.

    JAX's own (0.10.2 to 0.12.0 at least) is typed as the same on every device, and the gradient of what it indexes then
    misses a sum.
    """
    return vary_alike(jnp.argsort(keys, stable=True), keys)[0]


def _require_mesh(axes: Axes) -> None:
    """Raise `PlacementError` unless this code runs on each device of `axes` by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    mapped = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Manual]
    if missing := [axis for axis in axes if axis not in mapped]:
        raise PlacementError(
            f"a layer was called outside of its mesh: it needs the axes {', '.join(missing)}. For MoE and DenseMLP "
            "write `y, load = moe_jax.layers.on_mesh(layer, placement)(x)`; run others in `jax.shard_map(..., "
            "mesh=placement.mesh)`, their parameters split by `moe_jax.layers.specs(layer, placement)`"
        )


def _varying(value: Array) -> frozenset[str]:
    return jax.typeof(value).manual_axis_type.varying


def _product(axes: Axes) -> int:
    return math.prod(lax.axis_size(axis) for axis in axes)
