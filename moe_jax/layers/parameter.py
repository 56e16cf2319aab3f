"""How a parameter is made: drawn, and labelled with the role that splits each of its dimensions; where it then lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Shaped

from moe_jax.sharding import Placement, Role

Dims = tuple[Role | None, ...]
HeadNumber = Int32[Array, ""] | int


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], dims: Dims, *, fan_in: int, dtype: DTypeLike) -> nnx.Param:
    """A normally distributed parameter of variance `1 / fan_in`. `dims` names what splits each dimension."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype), dims=dims)


def zeros(shape: tuple[int, ...], dims: Dims, *, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype), dims=dims)


def ones(shape: tuple[int, ...], dims: Dims, *, dtype: DTypeLike) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype), dims=dims)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InPlace:
    """A layer's parameter in the stack of those of many layers, of which parts can be read without the whole."""

    stack: Shaped[Array, "L E ..."]
    layer: Int32[Array, ""]

    @classmethod
    def of_one(cls, parameter: Shaped[Array, "E ..."]) -> InPlace:
        """A stack of one."""
        return cls(parameter[None], jnp.zeros((), jnp.int32))

    @property
    def alone(self) -> bool:
        """Whether there is no other layer, so that the whole lies in place too."""
        return self.stack.shape[0] == 1

    def part(self, index: Int32[Array, ""]) -> Shaped[Array, "..."]:
        return self.stack[self.layer, index]

    def whole(self) -> Shaped[Array, "E ..."]:
        return self.stack[self.layer]

    def reshape(self, *shape: int) -> InPlace:
        """The parameter in another shape."""
        return InPlace(self.stack.reshape(self.stack.shape[0], *shape), self.layer)


class Cut:
    """A parameter as a layer of a scanned stack sees it: `parameter[...]` is the layer's own, as of any parameter."""

    def __init__(self, own: Array, stack: Array, layer: Int32[Array, ""]) -> None:
        self._own, self.shape, self.dtype = own, own.shape, own.dtype
        self.in_place = InPlace(stack, layer)

    def __getitem__(self, index: Any) -> Array:
        return self._own if index is ... else self._own[index]


def in_place(parameter: nnx.Param) -> InPlace:
    """Where a parameter lies."""
    value = parameter.get_value()
    return value.in_place if isinstance(value, Cut) else InPlace.of_one(value)


def placed(parameters: nnx.State, placement: Placement) -> nnx.State:
    """The shapes, dtypes and, from their labels, shardings of parameters, whether they are arrays or abstract."""

    def place(param: nnx.Param) -> nnx.Variable:
        sharding = placement.sharding(param.get_metadata("dims"), param.shape)
        return param.replace(jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=sharding))

    return jax.tree.map(place, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
