"""A selective state space (Mamba; Gu and Dao, arXiv:2312.00752), on the channels that this device holds.

T  rows     D  hidden     H  channels of this device     N  width of a channel's state     r  rank of steps
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import MambaConfig
from moe_jax.kernels.recurrences import Selection, selective_scan
from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.parameter import once, product
from moe_jax.layers.short_convolution import ShortConvolution
from moe_jax.sharding import PartialSum, Role
from moe_jax.sharding.collectives import sum_devices

S = TypeVar("S", bound=States)


class Channels(nnx.Module):
    """Rows to channels: `[T, D] -> [T, H]`."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        *,
        bias: bool,
        bias_dtype: DTypeLike,
        exact: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """An `exact` one is small, and never held in eight bits."""
        shape, dims = (inputs, channels), (None, Role.HEADS)
        self.weight = parameter.matrix(rngs, shape, dims, inputs=(0,), dtype=dtype, exact=exact)
        self.bias = parameter.zeros((channels,), (Role.HEADS,), dtype=bias_dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T H"]:
        out = product("td,dh->th", x, self.weight)
        return out if self.bias is None else out + self.bias[...]


class Mamba(nnx.Module):
    rotary: None = None
    """Positions are told apart by the state."""

    def __init__(self, config: MambaConfig, hidden: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        channels, width, rank = config.channels, config.d_state, config.dt_rank
        like = {"dtype": dtype, "rngs": rngs}
        self.input = Channels(hidden, channels, bias=config.bias, bias_dtype=dtype, **like)
        self.gate = Channels(hidden, channels, bias=config.bias, bias_dtype=dtype, **like)
        self.convolution = ShortConvolution(
            (channels,), config.d_conv, Role.HEADS, bias=config.convolution_bias, **like
        )
        self.select = parameter.normal(
            rngs, (channels, rank + 2 * width), (Role.HEADS, None), fan_in=channels, dtype=dtype
        )
        self.step_norm, self.into_norm, self.out_norm = (
            RMSNorm(each, eps, dtype=dtype) for each in (rank, width, width)
        )
        self.step = Channels(rank, channels, bias=True, bias_dtype=jnp.float32, exact=True, **like)
        self.log_rates = parameter.zeros((channels, width), (Role.HEADS, None), dtype=jnp.float32)
        self.skip = parameter.ones((channels,), (Role.HEADS,), dtype=jnp.float32)
        self.output = parameter.matrix(rngs, (channels, hidden), (Role.HEADS, None), inputs=(0,), dtype=dtype)
        self.output_bias = parameter.zeros((hidden,), (None,), dtype=dtype) if config.bias else None

    def __call__(self, x: Float[Array, "T D"], step: Step, states: S, layer: Int32[Array, ""]) -> tuple[PartialSum, S]:
        """This device's channels' part of the output, and the states with the rows taken in."""
        placement = step.residual.placement
        seen, states = self.convolution(self.input(x), states, layer, 0, step)
        rows = self._selection(seen, step)
        with jax.named_scope("advance"):
            scan = partial(selective_scan, rates=-jnp.exp(self.log_rates[...]))
            out, states = states.advance(layer, rows, (seen.shape[1], self.config.d_state), step, scan)
        out = (out + self.skip[...] * seen) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        part = product("th,hd->td", out.astype(x.dtype), self.output)
        if self.output_bias is not None:
            part += once(self.output_bias[...], placement, Role.HEADS)
        return step.residual.heads_partial_sum(part), states

    def _selection(self, seen: Float[Array, "T H"], step: Step) -> Selection:
        """All channels, those of other devices too, say how far to go, and what is taken in and read."""
        config = self.config
        selected = sum_devices(seen @ self.select[...], step.residual.placement.axes(Role.HEADS))
        far, into, out = jnp.split(selected, [config.dt_rank, config.dt_rank + config.d_state], axis=-1)
        steps = jax.nn.softplus(self.step(self.step_norm(far)).astype(jnp.float32))
        return Selection(seen, steps, self.into_norm(into), self.out_norm(out))
