"""How a parameter is made: drawn, and labelled with the role that splits each of its dimensions; where it then lies."""

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
HeadNumber = Int32[Array, ""] | int


class ShapesAlone(nnx.Rngs):
    """For modules of which only the shapes are wanted: zeros are traced many times quicker than draws."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    """A normally distributed parameter of variance `1 / fan_in`. `dims` names what splits each dimension."""
    return _param(_drawn(rngs, shape, fan_in, dtype), dims)


def matrix(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    dims: Dims,
    *,
    inputs: tuple[int, ...],
    dtype: DTypeLike,
    exact: bool = False,
) -> nnx.Param:
    """A normally distributed parameter that rows are multiplied with, by `product` or where it lies: it may be held in
    eight bits, if it is not to be `exact`. `inputs` are the dimensions that products sum over."""
    drawn = _drawn(rngs, shape, math.prod(shape[dim] for dim in inputs), dtype)
    return _param(drawn, dims, inputs=None if exact else tuple(dim - len(shape) for dim in inputs))


def _drawn(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    if isinstance(rngs, ShapesAlone):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)


def product(
    equation: str, x: Float[Array, "..."], parameter: nnx.Param, part: Callable[[Array], Array] = lambda whole: whole
) -> Float[Array, "..."]:
    """`einsum(equation, x, part(parameter))`, in the dtype of `x`. `part` takes some of the outputs."""
    value = parameter.get_value()
    if isinstance(value, QuantizedWeight):
        return value.map(lambda each: part(each[...])).product(equation, x)
    return jnp.einsum(equation, x, part(value[...]))


def zeros(shape: tuple[int, ...], dims: Dims, *, dtype: DTypeLike) -> nnx.Param:
    return _param(jnp.zeros(shape, dtype), dims)


def ones(shape: tuple[int, ...], dims: Dims, *, dtype: DTypeLike) -> nnx.Param:
    return _param(jnp.ones(shape, dtype), dims)


def _param(value: Array, dims: Dims, **metadata: Any) -> nnx.Param:
    """A parameter with Flax's sharding metadata. Flax leaves the value where it is: only a placement knows the mesh."""
    return nnx.Param(value, out_sharding=dims, eager_sharding=False, **metadata)


def one_head(weight: Array, only: HeadNumber | None, *, axis: int) -> Array:
    """A parameter's part for one head, or all of it."""
    return weight if only is None else lax.dynamic_slice_in_dim(weight, only, 1, axis)


def only_head(heads: int, placement: Placement) -> HeadNumber | None:
    """The one of so many heads that this device's query heads share, where there are fewer of them than devices."""
    devices = placement.size(Role.HEADS)
    return None if devices <= heads else placement.index(Role.HEADS) // (devices // heads)


def once(bias: Array, placement: Placement, role: Role) -> Array:
    """A bias for a partial sum: on the first of the devices that the role splits over, zero on the others."""
    return jnp.where(placement.index(role) == 0, bias, 0)


def stacked(parameter: nnx.Param) -> StackedWeight:
    """Where a parameter lies."""
    match parameter.get_value():
        case LayerSlice() as layer_slice:
            return layer_slice.stacked
        case QuantizedWeight(numbers=LayerSlice() as layer_slice) as value:
            return StackedWeight(value.map(lambda layer_slice: layer_slice.stacked.stack), layer_slice.stacked.layer)
        case value:
            return StackedWeight.of_one(value)


def placed(parameters: nnx.State, placement: Placement, quantization: Quantization | None = None) -> nnx.State:
    """The shapes, dtypes and, from their labels, shardings of parameters, whether they are arrays or abstract."""

    def place(param: nnx.Param) -> nnx.Variable:
        dims, inputs = param.get_metadata("out_sharding"), inputs_of(param)
        if quantization is None or inputs is None:
            return param.replace(_placed(param.shape, param.dtype, dims, placement))
        numbers = _placed(param.shape, jnp.int8, dims, placement)
        shape = _shape_of_scales(param.shape, dims, inputs, placement, quantization.block)
        whole = tuple(role if size > 1 else None for role, size in zip(dims, shape[-len(dims) :], strict=True))
        scales = _placed(shape, jnp.float32, whole, placement)
        return param.replace(QuantizedWeight(numbers, scales, quantization.dtype, param.dtype))

    return jax.tree.map(place, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def inputs_of(parameter: nnx.Variable) -> tuple[int, ...] | None:
    """The dimensions that products sum over, as counted from the last; `None` for what is never in eight bits."""
    return parameter.get_metadata().get("inputs")


def quantized(parameters: nnx.State, like: nnx.State, quantization: Quantization) -> nnx.State:
    """Arrays as `placed` says that they are held."""

    def convert(param: nnx.Param, wanted: nnx.Param) -> nnx.Variable:
        inputs, value = inputs_of(param), wanted.get_value()
        if inputs is None:
            return param
        assert isinstance(value, QuantizedWeight)
        numbers, scales = quantize(param[...].astype(jnp.float32), inputs, quantization)
        return param.replace(replace(value, numbers=numbers, scales=jnp.broadcast_to(scales, value.scales.shape)))

    return jax.tree.map(convert, parameters, like, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _placed(shape: tuple[int, ...], dtype: DTypeLike, dims: Dims, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(dims, shape))


def _shape_of_scales(
    shape: tuple[int, ...], dims: Dims, inputs: tuple[int, ...], placement: Placement, block: int | None
) -> tuple[int, ...]:
    """One for all inputs: the same on all devices, however these are split. Or one for each block of the last, cut
    smaller where a block would reach into another device's part."""
    sizes, (*_, last) = list(shape), inputs
    if block is None:
        return tuple(1 if dim - len(shape) in inputs else size for dim, size in enumerate(shape))
    role = dims[last]
    sizes[last] //= math.gcd(block, shape[last] // (1 if role is None else placement.size(role)))
    return tuple(sizes)
