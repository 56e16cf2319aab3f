"""Dense gated feed-forward (Shazeer, arXiv:2002.05202), as a block or as a shared expert.

T  own rows     N  gathered rows     D  hidden     F  this device's part of the width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import Activation, DenseConfig, SharedExpertConfig
from moe_jax.kernels.activation import gated_activation
from moe_jax.layers import parameter
from moe_jax.layers.parameter import einsum
from moe_jax.sharding import Combine, Role, Rows


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, the width split over every axis that a feed-forward sums over."""

    def __init__(self, hidden: int, width: int, activation: Activation, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.gate_up = parameter.matrix(rngs, (hidden, 2, width), (None, None, Role.PARTIAL), inputs=(0,), dtype=dtype)
        self.down = parameter.matrix(rngs, (width, hidden), (Role.PARTIAL, None), inputs=(0,), dtype=dtype)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Compute this device's part of the output."""
        gate, up = jnp.moveaxis(einsum("nd,dpf->npf", x, self.gate_up), 1, 0)
        return einsum("nf,fd->nd", gated_activation(self.activation, gate, up), self.down)


class DenseMLP(nnx.Module):
    """A feed-forward block without experts. It gathers, sums and combines rows as an MoE does."""

    def __init__(self, config: DenseConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.swiglu = SwiGLU(hidden, config.width, config.activation, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "T D"], rows: Rows, combine: Combine) -> tuple[Float[Array, "T D"], None]:
        """Return the outputs of this device's rows, and `None` in place of an MoE's load."""
        gathered = combine.gather(rows, x)
        (all_rows,) = gathered.values
        return combine.combine(gathered, gathered.partial_sum(self.swiglu(all_rows))), None


class SharedExpert(nnx.Module):
    """An expert that every row visits, scaled by a sigmoid gate in some models (Qwen2-MoE, arXiv:2407.10671)."""

    def __init__(self, config: SharedExpertConfig, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.swiglu = SwiGLU(hidden, config.width, config.activation, dtype=dtype, rngs=rngs)
        self.gate = parameter.normal(rngs, (hidden,), (None,), fan_in=hidden, dtype=dtype) if config.gated else None

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        """Compute this device's part of the output."""
        out = self.swiglu(x)
        return out if self.gate is None else out * jax.nn.sigmoid(x @ self.gate[...])[:, None]
