"""Linear attention with fixed decays (Lightning Attention-2; Qin et al., arXiv:2401.04658), on this device's heads.

T  rows     D  hidden     H  heads of this device     d  head width
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from moe_jax.config import LightningConfig
from moe_jax.kernels.recurrences import LinearInputs, alibi_slopes, linear_attention
from moe_jax.kernels.recurrent_states import States
from moe_jax.kernels.rope import Rotary
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.layers.norm import GroupNorm, HeadNorm
from moe_jax.layers.projection import HeadProjection, project_output
from moe_jax.sharding import PartialSum, Placement, Role

S = TypeVar("S", bound=States)


class LightningAttention(nnx.Module):
    """Linear attention whose heads decay at fixed rates, more slowly from layer to layer."""

    def __init__(
        self, config: LightningConfig, hidden: int, numbers: range, eps: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        """Create the parameters. `numbers` are the numbers of the layers that are stacked in this one."""
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
        """Return this device's heads' part of the output, and the states after the rows."""
        placement, width = step.residual.placement, self.config.head_dim
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            query, key = step.rotate(query, self.rotary), step.rotate(key, self.rotary)
        decay = jnp.broadcast_to(self._decay(placement, layer), query.shape[:2])
        with jax.named_scope("advance"):
            rows = LinearInputs(query * width**-0.5, key, value, decay)
            out, states = states.advance(layer, rows, (query.shape[1], width, width), step, linear_attention)
        out = self.norm(out, placement) * jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        return project_output(out.astype(x.dtype), self.output, None, step.residual), states

    def _decay(self, placement: Placement, layer: Int32[Array, ""]) -> Float[Array, "H"]:
        """Compute the logarithm of each head's decay from one position to the next, in a layer of the stack."""
        heads = self.config.heads // placement.size(Role.HEADS)
        slopes = jnp.asarray(alibi_slopes(self.config.heads), jnp.float32)
        rates = lax.dynamic_slice_in_dim(slopes, placement.index(Role.HEADS) * heads, heads)
        number = self.numbers.start + self.numbers.step * layer
        return -rates * (self.config.scale - self.config.scale_decrement * number)
