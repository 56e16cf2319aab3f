"""Weights of one layer where they lie, in the stack of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from moe_jax.kernels.quantized import QuantizedWeight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedWeight:
    """A layer's parameter in the stack of those of many layers, of which parts can be read without the whole."""

    stack: Shaped[Array, "L E ..."] | QuantizedWeight
    layer: Int32[Array, ""]

    @classmethod
    def of_one(cls, parameter: Shaped[Array, "E ..."] | QuantizedWeight) -> StackedWeight:
        """A stack of one."""
        return cls(jax.tree.map(lambda whole: whole[None], parameter), jnp.zeros((), jnp.int32))

    def part(self, index: Int32[Array, ""]) -> Shaped[Array, "..."]:
        return self.stack[self.layer, index]

    def whole(self) -> Shaped[Array, "E ..."]:
        return self.stack[self.layer]

    def reshape(self, *shape: int) -> StackedWeight:
        """The parameter in another shape."""
        return StackedWeight(self.stack.reshape(self.stack.shape[0], *shape), self.layer)


class LayerSlice:
    """A parameter as a layer of a scanned stack sees it: `parameter[...]` is the layer's own, as of any parameter."""

    def __init__(self, own: Array, stack: Array, layer: Int32[Array, ""]) -> None:
        self._own, self.shape, self.dtype = own, own.shape, own.dtype
        self.stacked = StackedWeight(stack, layer)

    def __getitem__(self, index: Any) -> Array:
        return self._own if index is ... else self._own[index]
