"""A short causal convolution of each channel over the last positions of its sequence, then a SiLU.

T  rows     H  heads, or channels, of this device     k  positions that the convolution sees
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.parameter import HeadNumber, take_head
from moe_jax.sharding import Role

S = TypeVar("S", bound=States)


class ShortConvolution(nnx.Module):
    """Depthwise causal convolution and SiLU."""

    def __init__(
        self,
        shape: tuple[int, ...],
        kernel: int,
        split: Role,
        *,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the parameters.

        Args:
          shape: shape of a row; `split` splits its first dimension.
          kernel: positions that the convolution sees.
        """
        dims = (split, *(None,) * (len(shape) - 1))
        self.weight = parameter.normal(rngs, (*shape, kernel), (*dims, None), fan_in=kernel, dtype=dtype)
        self.bias = parameter.zeros(shape, dims, dtype=dtype) if bias else None

    def __call__(
        self,
        x: Float[Array, "T H ..."],
        states: S,
        layer: Int32[Array, ""],
        number: int,
        step: Step,
        head: HeadNumber | None = None,
    ) -> tuple[Float[Array, "T H ..."], S]:
        """Convolve rows, and return the states with these added.

        Args:
          number: number of this convolution in its layer.
          head: the one head to compute; `None` for all heads held here.
        """
        weight = jnp.moveaxis(take_head(self.weight[...], head, axis=0), -1, 1)
        inputs, states = states.recall(layer, number, x, weight.shape[1], step)
        out = jnp.einsum("thk...,hk...->th...", inputs, weight)
        return jax.nn.silu(out if self.bias is None else out + take_head(self.bias[...], head, axis=0)), states
