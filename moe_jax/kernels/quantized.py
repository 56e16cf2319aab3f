"""Weights in eight bits, and products with them.

A weight is a number times a scale. The scales have the shape of the numbers except for the inputs, the dimensions that
products sum over: one scale serves all inputs, or one each block of the last input dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8

from moe_jax.config import Quantization, WeightDtype
from moe_jax.errors import ConfigError

A = TypeVar("A", np.ndarray, jax.Array)

NO_GRADIENT = "weights in eight bits have no gradient: train with exact weights"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """Value of a parameter that is held in eight bits. It has no gradient.

    Indexing it makes a copy in `dtype`: index some of the outputs, or use `einsum`.
    """

    numbers: Any
    """Numbers, an array of int8 or a stand-in for one.

    float8 is held as its bits: XLA's CPU backend would widen a whole array of float8 that a loop takes slices of.
    """
    scales: Any
    """Scales, in float32."""
    kind: WeightDtype = field(metadata={"static": True})
    """Format of the numbers."""
    dtype: DTypeLike = field(metadata={"static": True})
    """Dtype that indexing returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        """Decode some of the outputs. The index must leave the inputs whole."""
        numbers, scales = _without_gradient(self.numbers[index], self.scales[index])
        for dim, (blocks, size) in enumerate(zip(scales.shape, numbers.shape, strict=True)):
            if 1 < blocks < size:
                scales = jnp.repeat(scales, size // blocks, axis=dim)
        return (self._decoded(numbers, jnp.float32) * scales).astype(self.dtype)

    def map(self, function: Callable[[Any], Any]) -> QuantizedWeight:
        """Apply a function to the numbers and to the scales."""
        return replace(self, numbers=function(self.numbers), scales=function(self.scales))

    def reshape(self, *shape: int) -> QuantizedWeight:
        """Merge the last dimensions, which must be outputs."""
        scales = self.scales.reshape(*self.scales.shape[: len(shape) - 1], -1)
        return replace(self, numbers=self.numbers.reshape(shape), scales=scales)

    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Compute `einsum(equation, x, weights)`, converting the numbers as they are multiplied.

        The scales multiply the products, or `x` if the equation sums over a dimension with a scale for each index.
        Weights with blocks of inputs are decoded first.
        """
        inputs, letters, out = equation.replace("->", ",").split(",")
        numbers, scales = _without_gradient(self.numbers, self.scales)
        sizes = {letter: size for letter, size in zip(letters, scales.shape, strict=True) if size > 1}
        in_blocks = any(size < numbers.shape[letters.index(letter)] for letter, size in sizes.items())
        if in_blocks or not (sizes.keys() <= set(out) or sizes.keys() <= set(inputs)):
            return jnp.einsum(equation, x, self[...])

        def broadcast_to(dims: str) -> Float[Array, "..."]:
            order = [letter for letter in dims if letter in sizes]
            assert order == list(sizes), "outputs keep their order"
            return scales.reshape([sizes.get(letter, 1) for letter in dims])

        numbers = self._decoded(numbers, x.dtype)
        if sizes.keys() <= set(out):
            products = jnp.einsum(equation, x, numbers, preferred_element_type=jnp.float32)
            return (products * broadcast_to(out)).astype(x.dtype)
        return jnp.einsum(equation, (x * broadcast_to(inputs)).astype(x.dtype), numbers)

    def _decoded(self, numbers: Int8[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
        """Convert numbers without their scales. Every dtype of computation represents all of them exactly."""
        return lax.bitcast_convert_type(numbers, self.kind.value).astype(dtype)


def quantize(weights: A, inputs: tuple[int, ...], quantization: Quantization) -> tuple[A, A]:
    """Return int8 numbers and float32 scales. Each output's largest weight becomes the largest number.

    Args:
      weights: exact weights, in float32.
      inputs: dimensions of `weights` that products sum over.
    """
    scales: Any = abs(weights).max(axis=inputs, keepdims=True) / np.float32(quantization.largest)
    scales = scales + (scales == 0)
    numbers: Any = weights / scales
    if quantization.dtype is WeightDtype.INT8:
        numbers = numbers.round().clip(-quantization.largest, quantization.largest)
    return numbers.astype(quantization.dtype.value).view(np.int8), scales.astype(np.float32)


@jax.custom_jvp
def _without_gradient(
    numbers: Int8[Array, "..."], scales: Float[Array, "..."]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    return numbers, scales


@_without_gradient.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ConfigError(NO_GRADIENT)
