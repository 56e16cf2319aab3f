"""Parameters: their creation, labelled with the role that splits each dimension, their placement, and their use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import Quantization
from moe_jax.kernels.quantized import QuantizedWeight, quantize
from moe_jax.kernels.stacked_weight import LayerSlice, StackedWeight
from moe_jax.sharding import Placement, Role

Dims = tuple[Role | None, ...]
"""Role that splits each dimension of a parameter; `None` for a dimension that is whole on every device."""
HeadNumber = Int32[Array, ""] | int


class ShapesAlone(nnx.Rngs):
    """Random numbers for modules whose shapes alone matter: zeros trace much faster than draws."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    """Create a normally distributed parameter of variance `1 / fan_in`."""
    return _param(_draw(rngs, shape, fan_in, dtype), dims)


def matrix(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    dims: Dims,
    *,
    inputs: tuple[int, ...],
    dtype: DTypeLike,
    exact: bool = False,
) -> nnx.Param:
    """Create a normally distributed parameter that rows are multiplied with, and that eight bits may hold.

    Args:
      inputs: dimensions that products sum over.
      exact: never hold it in eight bits.
    """
    value = _draw(rngs, shape, math.prod(shape[dim] for dim in inputs), dtype)
    return _param(value, dims, inputs=None if exact else tuple(dim - len(shape) for dim in inputs))


def zeros(shape: tuple[int, ...], dims: Dims, *, dtype: DTypeLike) -> nnx.Param:
    """Create a parameter of zeros."""
    return _param(jnp.zeros(shape, dtype), dims)


def ones(shape: tuple[int, ...], dims: Dims, *, dtype: DTypeLike) -> nnx.Param:
    """Create a parameter of ones."""
    return _param(jnp.ones(shape, dtype), dims)


def einsum(
    equation: str, x: Float[Array, "..."], parameter: nnx.Param, part: Callable[[Array], Array] = lambda whole: whole
) -> Float[Array, "..."]:
    """Compute `einsum(equation, x, part(parameter))`, in the dtype of `x`. `part` takes some of the outputs."""
    value = parameter.get_value()
    if isinstance(value, QuantizedWeight):
        return value.map(lambda each: part(each[...])).einsum(equation, x)
    return jnp.einsum(equation, x, part(value[...]))


def stacked(parameter: nnx.Param) -> StackedWeight:
    """Return the stack of layers that a parameter lies in, and its layer."""
    match parameter.get_value():
        case LayerSlice() as layer_slice:
            return layer_slice.stacked
        case QuantizedWeight(numbers=LayerSlice() as layer_slice) as value:
            return StackedWeight(value.map(lambda layer_slice: layer_slice.stacked.stack), layer_slice.stacked.layer)
        case value:
            return StackedWeight.of_one(value)


def take_head(weight: Array, head: HeadNumber | None, *, axis: int) -> Array:
    """Take one head of a parameter; all heads for `None`."""
    return weight if head is None else lax.dynamic_slice_in_dim(weight, head, 1, axis)


def shared_head(heads: int, placement: Placement) -> HeadNumber | None:
    """Return the KV head that this device's query heads share, if there are fewer KV heads than devices."""
    devices = placement.size(Role.HEADS)
    return None if devices <= heads else placement.index(Role.HEADS) // (devices // heads)


def bias_part(bias: Array, placement: Placement, role: Role) -> Array:
    """Return this device's part of a bias of a partial sum: the bias on the first device of `role`, zero on others."""
    return jnp.where(placement.index(role) == 0, bias, 0)


def placed(parameters: nnx.State, placement: Placement, quantization: Quantization | None = None) -> nnx.State:
    """Return the shapes, dtypes and shardings that parameters, arrays or abstract, have on a placement."""

    def place(param: nnx.Param) -> nnx.Variable:
        dims, inputs = param.get_metadata("out_sharding"), inputs_of(param)
        if quantization is None or inputs is None:
            return param.replace(_placed(param.shape, param.dtype, dims, placement))
        numbers = _placed(param.shape, jnp.int8, dims, placement)
        shape = _scales_shape(param.shape, dims, inputs, placement, quantization.block)
        whole = tuple(role if size > 1 else None for role, size in zip(dims, shape[-len(dims) :], strict=True))
        scales = _placed(shape, jnp.float32, whole, placement)
        return param.replace(QuantizedWeight(numbers, scales, quantization.dtype, param.dtype))

    return jax.tree.map(place, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def inputs_of(parameter: nnx.Variable) -> tuple[int, ...] | None:
    """Return the dimensions that products sum over, counted from the last; `None` for a parameter held exactly."""
    return parameter.get_metadata().get("inputs")


def quantized(parameters: nnx.State, like: nnx.State, quantization: Quantization) -> nnx.State:
    """Quantize the parameters that `like`, as `placed` returns it, holds in eight bits."""

    def convert(param: nnx.Param, wanted: nnx.Param) -> nnx.Variable:
        inputs, value = inputs_of(param), wanted.get_value()
        if inputs is None:
            return param
        assert isinstance(value, QuantizedWeight)
        numbers, scales = quantize(param[...].astype(jnp.float32), inputs, quantization)
        return param.replace(replace(value, numbers=numbers, scales=jnp.broadcast_to(scales, value.scales.shape)))

    return jax.tree.map(convert, parameters, like, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _draw(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    if isinstance(rngs, ShapesAlone):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)


def _param(value: Array, dims: Dims, **metadata: Any) -> nnx.Param:
    """Label a parameter with Flax's sharding metadata. Flax leaves the value where it is: a placement has the mesh."""
    return nnx.Param(value, out_sharding=dims, eager_sharding=False, **metadata)


def _placed(shape: tuple[int, ...], dtype: DTypeLike, dims: Dims, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(dims, shape))


def _scales_shape(
    shape: tuple[int, ...], dims: Dims, inputs: tuple[int, ...], placement: Placement, block: int | None
) -> tuple[int, ...]:
    """Return the shape of a parameter's scales.

    Without blocks, one scale serves all inputs, those of other devices too. Blocks divide the last input dimension;
    they are cut smaller where a block would reach into another device's part.
    """
    sizes, (*_, last) = list(shape), inputs
    if block is None:
        return tuple(1 if dim - len(shape) in inputs else size for dim, size in enumerate(shape))
    role = dims[last]
    sizes[last] //= math.gcd(block, shape[last] // (1 if role is None else placement.size(role)))
    return tuple(sizes)
