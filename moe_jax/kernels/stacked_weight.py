"""Weights of one layer, read where they lie in the stack of all layers.

XLA copies a slice of a stack that a matmul in a loop over layers reads; reading one group's weights from the stack
needs no copy of the layer.

L  layers     E  experts, or groups
"""

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
    """One layer's parameter, as a stack of many layers' and the layer's number."""

    stack: Shaped[Array, "L E ..."] | QuantizedWeight
    layer: Int32[Array, ""]

    @classmethod
    def of_one(cls, parameter: Shaped[Array, "E ..."] | QuantizedWeight) -> StackedWeight:
        """Make a stack of one layer."""
        return cls(jax.tree.map(lambda whole: whole[None], parameter), jnp.zeros((), jnp.int32))

    def group(self, index: Int32[Array, ""]) -> Shaped[Array, "..."]:
        """Weights of one expert, or group."""
        return self.stack[self.layer, index]

    def whole(self) -> Shaped[Array, "E ..."]:
        """Weights of the whole layer: a copy."""
        return self.stack[self.layer]

    def reshape(self, *shape: int) -> StackedWeight:
        """Reshape the layer's parameter."""
        return StackedWeight(self.stack.reshape(self.stack.shape[0], *shape), self.layer)


class LayerSlice:
    """A parameter as one layer of a scanned stack sees it: `parameter[...]` is that layer's part."""

    def __init__(self, own: Array, stack: Array, layer: Int32[Array, ""]) -> None:
        self._own, self.shape, self.dtype = own, own.shape, own.dtype
        self.stacked = StackedWeight(stack, layer)

    def __getitem__(self, index: Any) -> Array:
        return self._own if index is ... else self._own[index]
