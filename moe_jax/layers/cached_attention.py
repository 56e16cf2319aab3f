"""Attention over a cache: the steps that grouped-query and latent attention have in common.

T  rows     D  hidden     H  query heads, K  KV heads of this device     d, v  widths of queries and values
S  segments of a query layout     C  rows of a segment
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float, Int32

from moe_jax.kernels.forward_batch import ForwardBatch
from moe_jax.kernels.kv_cache import CachedKV, KVCache, KVView
from moe_jax.kernels.step import Step
from moe_jax.layers.projection import HeadProjection, project_output
from moe_jax.sharding import PartialSum

C = TypeVar("C", bound=KVCache)


class CachedAttention(nnx.Module):
    """Base of attention layers: project, write the cache, attend, gate, and project the output."""

    window: int | None
    """Positions that a row attends to, as the config of the layer says; `None` for all."""
    gate: HeadProjection | None
    """Projection whose sigmoid multiplies the heads' outputs."""
    output: nnx.Param
    """Output projection, `[H, v, D]`."""
    output_bias: nnx.Param | None

    def __call__(self, x: Float[Array, "T D"], step: Step, cache: C, layer: Int32[Array, ""]) -> tuple[PartialSum, C]:
        """Return this device's heads' part of the output, and the cache with the rows' keys and values written."""
        query, key, value = self._project(x, step)
        view, cache = cache.write(layer, key, value, step.batch, self.window)
        with jax.named_scope("attend"):
            out = self._attend_layouts(query, view, step.batch)
        if self.gate is not None:
            out *= jax.nn.sigmoid(self.gate(x))
        return project_output(out, self.output, self.output_bias, step.residual), cache

    def _attend_layouts(self, query: Float[Array, "T H d"], view: KVView, batch: ForwardBatch) -> Float[Array, "T H v"]:
        def attend(cached: CachedKV, query: Float[Array, "S C H d"], positions: Int32[Array, "S C"]) -> Array:
            return self._attend(query, cached, positions)

        outputs = []
        for layout in batch.layouts:
            rows = (batch.to_padded(part, layout) for part in (query, batch.positions))
            outputs.append(view(layout).map_segments(attend, *rows))
        return batch.to_rows(outputs)

    @abstractmethod
    def _project(
        self, x: Float[Array, "T D"], step: Step
    ) -> tuple[Float[Array, "T H d"], Float[Array, "T K d"], Float[Array, "T K v"]]:
        """Compute the queries, and the keys and values to cache."""

    @abstractmethod
    def _attend(
        self, query: Float[Array, "S C H d"], cached: CachedKV, positions: Int32[Array, "S C"]
    ) -> Float[Array, "S C H v"]:
        """Attend to cached keys and values from rows at `positions`."""
