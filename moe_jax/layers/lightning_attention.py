"""Linear attention with fixed decays (Lightning Attention-2; Qin et al., arXiv:2401.04658), on this device's heads.

T  rows     D  hidden     H  heads of this device     d  head width
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import LightningConfig
from moe_jax.kernels.recurrences import Linear, linear_attention
from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.rope import Rotary
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.attention import HeadProjection
from moe_jax.layers.norm import GroupNorm, HeadNorm
from moe_jax.layers.parameter import product
from moe_jax.sharding import PartialSum, Placement, Role

S = TypeVar("S", bound=States)


class LightningAttention(nnx.Module):
    def __init__(
        self, config: LightningConfig, hidden: int, numbers: range, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """`numbers` are those of the layers whose parameters are stacked in this one."""
        self.config, self.numbers = config, numbers
        heads, width = config.heads, config.head_dim
        like = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.query, self.key, self.value, self.gate = (
            HeadProjection(hidden, heads, width, Role.HEADS, **like) for _ in range(4)
        )
        self.query_norm = HeadNorm(width, eps, dtype=dtype) if config.qk_norm else None
        self.key_norm = HeadNorm(width, eps, dtype=dtype) if config.qk_norm else None
        self.rotary = Rotary(config.rope, width) if config.rope else None
        self.norm = GroupNorm(config.norm_groups, heads, width, eps, dtype=dtype)
        self.output = parameter.matrix(
            rngs, (heads, width, hidden), (Role.HEADS, None, None), inputs=(0, 1), dtype=dtype
        )

    def __call__(self, x: Float[Array, "T D"], step: Step, states: S, layer: Int32[Array, ""]) -> tuple[PartialSum, S]:
        """This device's heads' part of the output, and the states with the rows taken in."""
        placement, width = step.residual.placement, self.config.head_dim
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            query, key = step.rotate(query, self.rotary), step.rotate(key, self.rotary)
        decay = jnp.broadcast_to(self._decay(placement, layer), query.shape[:2])
        with jax.named_scope("advance"):
            rows = Linear(query * width**-0.5, key, value, decay)
            out, states = states.advance(layer, rows, (query.shape[1], width, width), step, linear_attention)
        out = self.norm(out, placement) * jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        part = product("thk,hkd->td", out.astype(x.dtype), self.output)
        return step.residual.heads_partial_sum(part), states

    def _decay(self, placement: Placement, layer: Int32[Array, ""]) -> Float[Array, "H"]:
        """The logarithm of what each head keeps from one position to the next, in the layer of a stack."""
        here = self.config.heads // placement.size(Role.HEADS)
        rates = jnp.asarray(slopes(self.config.heads), jnp.float32)
        own = lax.dynamic_slice_in_dim(rates, placement.index(Role.HEADS) * here, here)
        number = self.numbers.start + self.numbers.step * layer
        return -own * (self.config.scale - self.config.scale_decrement * number)


def slopes(heads: int) -> Float[np.ndarray, "H"]:
    """Rates from `2 ** (-8 / heads)` to `2 ** -8`, in equal ratios, as ALiBi has them (Press et al., arXiv:2108.12409);
    those of a number of heads that is no power of two are filled up from every other one of twice the power below."""
    power = 2 ** (heads.bit_length() - 1)
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    return first if power == heads else np.concatenate([first, slopes(2 * power)[::2][: heads - power]])
