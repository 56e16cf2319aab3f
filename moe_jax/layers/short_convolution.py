"""A short convolution of each number over the last positions of its sequence, then a SiLU.

T  rows     H  heads of this device, or channels     k  positions that it sees
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
from moe_jax.layers.parameter import HeadNumber, one_head
from moe_jax.sharding import Role

S = TypeVar("S", bound=States)


class ShortConvolution(nnx.Module):
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
        """`shape` is that of a row: heads, which are split, and what follows."""
        dims = (split, *(None,) * (len(shape) - 1))
        self.weight = parameter.normal(rngs, (*shape, kernel), (*dims, None), fan_in=kernel, dtype=dtype)
        self.bias = parameter.zeros(shape, dims, dtype=dtype) if bias else None

    def __call__(
        self,
        x: Float[Array, "T H ..."],
        states: S,
        layer: Int32[Array, ""],
        part: int,
        step: Step,
        only: HeadNumber | None = None,
    ) -> tuple[Float[Array, "T H ..."], S]:
        """Also the states with the rows taken in, as those of the layer's convolution number `part`."""
        weight = jnp.moveaxis(one_head(self.weight[...], only, axis=0), -1, 1)
        seen, states = states.recall(layer, part, x, weight.shape[1], step)
        out = jnp.einsum("thk...,hk...->th...", seen, weight)
        return jax.nn.silu(out if self.bias is None else out + one_head(self.bias[...], only, axis=0)), states
