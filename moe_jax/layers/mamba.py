"""A selective state space (Mamba; Gu and Dao, arXiv:2312.00752), on the channels that this device holds.

T  rows     D  hidden     H  channels of this device     N  width of a channel's state
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
from moe_jax.kernels.recurrences import SelectiveScanInputs, selective_scan
from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.norm import RMSNorm
from moe_jax.layers.projection import ChannelProjection, project_output
from moe_jax.layers.short_convolution import ShortConvolution
from moe_jax.sharding import PartialSum, Role
from moe_jax.sharding.collectives import sum_devices

S = TypeVar("S", bound=States)


class Mamba(nnx.Module):
    """Selective scan over a short convolution of the channels, then a gate."""

    rotary: None = None
    """No rotary embedding: the state orders positions."""

    def __init__(self, config: MambaConfig, hidden: int, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        channels, width, rank = config.channels, config.d_state, config.dt_rank
        like = {"dtype": dtype, "rngs": rngs}
        self.input = ChannelProjection(hidden, channels, bias=config.bias, bias_dtype=dtype, **like)
        self.gate = ChannelProjection(hidden, channels, bias=config.bias, bias_dtype=dtype, **like)
        self.convolution = ShortConvolution(
            (channels,), config.d_conv, Role.HEADS, bias=config.convolution_bias, **like
        )
        self.select = parameter.normal(
            rngs, (channels, rank + 2 * width), (Role.HEADS, None), fan_in=channels, dtype=dtype
        )
        self.step_norm, self.into_norm, self.out_norm = (
            RMSNorm(each, eps, dtype=dtype) for each in (rank, width, width)
        )
        self.step = ChannelProjection(rank, channels, bias=True, bias_dtype=jnp.float32, exact=True, **like)
        self.log_rates = parameter.zeros((channels, width), (Role.HEADS, None), dtype=jnp.float32)
        self.skip = parameter.ones((channels,), (Role.HEADS,), dtype=jnp.float32)
        self.output = parameter.matrix(rngs, (channels, hidden), (Role.HEADS, None), inputs=(0,), dtype=dtype)
        self.output_bias = parameter.zeros((hidden,), (None,), dtype=dtype) if config.bias else None

    def __call__(self, x: Float[Array, "T D"], step: Step, states: S, layer: Int32[Array, ""]) -> tuple[PartialSum, S]:
        """Return this device's channels' part of the output, and the states after the rows."""
        convolved, states = self.convolution(self.input(x), states, layer, 0, step)
        rows = self._scan_inputs(convolved, step)
        with jax.named_scope("advance"):
            scan = partial(selective_scan, rates=-jnp.exp(self.log_rates[...]))
            out, states = states.advance(layer, rows, (convolved.shape[1], self.config.d_state), step, scan)
        out = (out + self.skip[...] * convolved) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        return project_output(out.astype(x.dtype), self.output, self.output_bias, step.residual), states

    def _scan_inputs(self, x: Float[Array, "T H"], step: Step) -> SelectiveScanInputs:
        """Compute step sizes, and input and output projections, from the channels of all devices."""
        config = self.config
        selected = sum_devices(x @ self.select[...], step.residual.placement.axes(Role.HEADS))
        dt, b, c = jnp.split(selected, [config.dt_rank, config.dt_rank + config.d_state], axis=-1)
        dt = jax.nn.softplus(self.step(self.step_norm(dt)).astype(jnp.float32))
        return SelectiveScanInputs(x, dt, self.into_norm(b), self.out_norm(c))
