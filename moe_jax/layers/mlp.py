"""The dense gated feed-forward (Shazeer, arXiv:2002.05202), alone or as a shared expert.

T  own rows     N  gathered rows     D  hidden     F  this device's part of the width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import Activation, DenseConfig, SharedExpertConfig
from moe_jax.kernels.activation import gated
from moe_jax.layers import parameter
from moe_jax.layers.parameter import product
from moe_jax.sharding import Combine, Role, Rows


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, the width split over every axis that a feed-forward sums over."""

    def __init__(self, hidden: int, width: int, activation: Activation, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.gate_up = parameter.matrix(rngs, (hidden, 2, width), (None, None, Role.PARTIAL), inputs=(0,), dtype=dtype)
        self.down = parameter.matrix(rngs, (width, hidden), (Role.PARTIAL, None), inputs=(0,), dtype=dtype)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """This device's part of the output."""
        gate, up = jnp.moveaxis(product("nd,dpf->npf", x, self.gate_up), 1, 0)
        return product("nf,fd->nd", gated(self.activation, gate, up), self.down)


class DenseMLP(nnx.Module):
    """A feed-forward block without experts. It goes the way an MoE goes: gather, partial sum, combine."""

    def __init__(self, config: DenseConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.swiglu = SwiGLU(hidden, config.width, config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"], rows: Rows, combine: Combine) -> tuple[Float[Array, "T D"], None]:
        gathered = combine.gather(rows, x)
        (everyone,) = gathered.values
        return combine.combine(gathered, gathered.partial_sum(self.swiglu(everyone))), None


class SharedExpert(nnx.Module):
    """An expert that every row visits, scaled by a sigmoid gate in some models (Qwen2-MoE, arXiv:2407.10671)."""

    def __init__(self, config: SharedExpertConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.swiglu = SwiGLU(hidden, config.width, config.activation, dtype=dtype, rngs=rngs)
        self.gate = parameter.normal(rngs, (hidden,), (None,), fan_in=hidden, dtype=dtype) if config.gated else None

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """This device's part of the output."""
        out = self.swiglu(x)
        return out if self.gate is None else out * jax.nn.sigmoid(x @ self.gate[...])[:, None]
