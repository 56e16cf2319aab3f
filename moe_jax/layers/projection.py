"""Projections between rows and the heads, latents or channels of attention and recurrent layers.

T  rows     D  hidden     H  heads, or channels, of this device     d  head width     r  width of a latent
"""

from __future__ import annotations

from functools import partial

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import OutputGate
from moe_jax.layers import parameter
from moe_jax.layers.parameter import HeadNumber, bias_part, einsum, take_head
from moe_jax.sharding import PartialSum, ResidualLayout, Role


class HeadProjection(nnx.Module):
    """Project rows to heads: `[T, D] -> [T, H, d]`."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        split: Role,
        *,
        bias: bool,
        exact: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the parameters.

        Args:
          split: role that splits the heads.
          exact: never hold the matrix in eight bits, as it is small.
        """
        shape, dims = (hidden, heads, head_dim), (None, split, None)
        self.weight = parameter.matrix(rngs, shape, dims, inputs=(0,), dtype=dtype, exact=exact)
        self.bias = parameter.zeros((heads, head_dim), (split, None), dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"], head: HeadNumber | None = None) -> Float[Array, "T H d"]:
        """Project to all heads held here, or to one of them."""
        out = einsum("td,dhk->thk", x, self.weight, partial(take_head, head=head, axis=1))
        return out if self.bias is None else out + take_head(self.bias[...], head, axis=0)


class LatentProjection(nnx.Module):
    """Project rows to latents: `[T, D] -> [T, r]`. Every device holds the whole matrix."""

    def __init__(self, hidden: int, rank: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.weight = parameter.matrix(rngs, (hidden, rank), (None, None), inputs=(0,), dtype=dtype)
        self.bias = parameter.zeros((rank,), (None,), dtype=dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T r"]:
        out = einsum("td,dr->tr", x, self.weight)
        return out if self.bias is None else out + self.bias[...]


class ChannelProjection(nnx.Module):
    """Project rows to channels: `[T, D] -> [T, H]`."""

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
        """Create the parameters.

        Args:
          exact: never hold the matrix in eight bits, as it is small.
        """
        shape, dims = (inputs, channels), (None, Role.HEADS)
        self.weight = parameter.matrix(rngs, shape, dims, inputs=(0,), dtype=dtype, exact=exact)
        self.bias = parameter.zeros((channels,), (Role.HEADS,), dtype=bias_dtype) if bias else None

    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T H"]:
        out = einsum("td,dh->th", x, self.weight)
        return out if self.bias is None else out + self.bias[...]


def output_gate(
    gate: OutputGate | None, hidden: int, heads: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> HeadProjection | None:
    """Create the projection whose sigmoid multiplies the outputs of heads of a width."""
    if gate is None:
        return None
    width = 1 if gate is OutputGate.HEAD else width
    return HeadProjection(hidden, heads, width, Role.HEADS, bias=False, dtype=dtype, rngs=rngs)


def project_output(
    out: Float[Array, "T H ..."], weight: nnx.Param, bias: nnx.Param | None, residual: ResidualLayout
) -> PartialSum:
    """Project this device's heads `[T, H, d]`, or channels `[T, H]`, to its part of the output `[T, D]`."""
    part = einsum("thv,hvd->td" if out.ndim == 3 else "th,hd->td", out, weight)
    if bias is not None:
        part += bias_part(bias[...], residual.placement, Role.HEADS)
    return residual.heads_partial_sum(part)
