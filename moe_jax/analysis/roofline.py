"""How long a decode step should take at best, and what it holds in memory: from sizes alone, without running it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from moe_jax.config import LayerConfig, MoEConfig
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE
from moe_jax.sharding import Hardware


@dataclass(frozen=True)
class Roofline:
    """Of one decode step with full caches, on each device."""

    weight_bytes: int
    cache_bytes: int
    memory_seconds: float
    """To read the weights and the cache once."""
    compute_seconds: float
    """For the multiplications of all rows with the weights that they visit."""
    collective_seconds: float
    """Of all layers, if nothing overlaps."""

    @property
    def step_seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds) + self.collective_seconds

    @property
    def collective_share(self) -> float:
        return self.collective_seconds / self.step_seconds


def roofline(
    decoder: ShardedDecoder, hardware: Hardware, *, rows: int, slots: int, positions: int, collective_seconds: float
) -> Roofline:
    """For `rows` rows in all, with caches of `slots` sequences of `positions` on each token shard.

    Args:
      collective_seconds: predicted for those of all layers.
    """
    weights = held_bytes(decoder.parameters)
    pages = slots * -(-positions // PAGE)
    caches = held_bytes(decoder.abstract_caches(dict.fromkeys(decoder.windows, pages), PAGE, slots))
    flops = 2 * rows * sum(_visited(decoder)) / decoder.placement.mesh.devices.size
    return Roofline(
        weight_bytes=weights,
        cache_bytes=caches,
        memory_seconds=(weights + caches) / hardware.memory_bandwidth * hardware.sharers(decoder.placement),
        compute_seconds=flops / hardware.flops * hardware.sharers(decoder.placement),
        collective_seconds=collective_seconds,
    )


def held_bytes(arrays: Any) -> int:
    """Of arrays or their shapes, on the device that holds most."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )


def _visited(decoder: ShardedDecoder) -> Iterator[float]:
    """The weights of each parameter that one token is multiplied with."""
    for path, parameter in nnx.to_flat_state(decoder.parameters):
        match path:
            case ("stacks", int(group), "unit", int(block), "ffn", "experts", *_):
                yield math.prod(parameter.shape) * _share(decoder.groups[group].unit[block])
            case ("embedding", *_) if not decoder.config.tied_embeddings:
                yield 0
            case _:
                yield math.prod(parameter.shape)


def _share(layer: LayerConfig) -> float:
    assert isinstance(layer.ffn, MoEConfig)
    return layer.ffn.top_k / layer.ffn.experts
