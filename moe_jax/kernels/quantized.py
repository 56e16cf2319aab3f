"""Weights in eight bits, and products with them.

A weight is its number times its scale. Scales have the shape of the numbers but for the inputs, the dimensions that
products sum over: there is one for all of them, or one for each block of the last.
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
    """A parameter's value. Where an array is wanted, it reads as the numbers that it means, which are then a copy; so
    take a part of it, or a product. It has no gradient."""

    numbers: Any
    """An array of int8, or what stands for one; the bits of float8, as XLA's CPU backend widens all of an array of it
    that a loop takes slices of."""
    scales: Any
    """In float32."""
    kind: WeightDtype = field(metadata={"static": True})
    dtype: DTypeLike = field(metadata={"static": True})
    """That it reads as."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    def __getitem__(self, index: Any) -> Float[Array, "..."]:
        """Indices of outputs only: the inputs are taken whole."""
        numbers, scales = _without_gradient(self.numbers[index], self.scales[index])
        for dim, (blocks, size) in enumerate(zip(scales.shape, numbers.shape, strict=True)):
            if 1 < blocks < size:
                scales = jnp.repeat(scales, size // blocks, axis=dim)
        return (self._decoded(numbers, jnp.float32) * scales).astype(self.dtype)

    def map(self, function: Callable[[Any], Any]) -> QuantizedWeight:
        """What is done to numbers and scales alike."""
        return replace(self, numbers=function(self.numbers), scales=function(self.scales))

    def reshape(self, *shape: int) -> QuantizedWeight:
        """The last dimensions, which are outputs, as one."""
        scales = self.scales.reshape(*self.scales.shape[: len(shape) - 1], -1)
        return replace(self, numbers=self.numbers.reshape(shape), scales=scales)

    def product(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`einsum(equation, x, weights)`. The numbers are converted as they are multiplied; scales are applied to the
        products, or to `x` where the equation sums over what has a scale each. Blocks of inputs are read first."""
        inputs, letters, out = equation.replace("->", ",").split(",")
        numbers, scales = _without_gradient(self.numbers, self.scales)
        sizes = {letter: size for letter, size in zip(letters, scales.shape, strict=True) if size > 1}
        in_blocks = any(size < numbers.shape[letters.index(letter)] for letter, size in sizes.items())
        if in_blocks or not (sizes.keys() <= set(out) or sizes.keys() <= set(inputs)):
            return jnp.einsum(equation, x, self[...])

        def over(dims: str) -> Float[Array, "..."]:
            order = [letter for letter in dims if letter in sizes]
            assert order == list(sizes), "outputs keep their order"
            return scales.reshape([sizes.get(letter, 1) for letter in dims])

        numbers = self._decoded(numbers, x.dtype)
        if sizes.keys() <= set(out):
            wide = jnp.einsum(equation, x, numbers, preferred_element_type=jnp.float32)
            return (wide * over(out)).astype(x.dtype)
        return jnp.einsum(equation, (x * over(inputs)).astype(x.dtype), numbers)

    def _decoded(self, numbers: Int8[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
        """Every dtype of computation has all numbers of either kind."""
        return lax.bitcast_convert_type(numbers, self.kind.value).astype(dtype)


def quantize(weights: A, inputs: tuple[int, ...], quantization: Quantization) -> tuple[A, A]:
    """Numbers as int8, and the scale of each output: the largest of its weights becomes the largest number.

    Args:
      inputs: the dimensions of `weights`, in float32, that products sum over.
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
