"""Roofline model: a lower bound on the time of a decode step, and its memory, from sizes alone."""

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
    """Memory and time of one decode step with full caches, on each device."""

    weight_bytes: int
    cache_bytes: int
    memory_seconds: float
    """Time to read the weights and the cache once."""
    compute_seconds: float
    """Time to multiply all rows by the weights that they visit."""
    collective_seconds: float
    """Time of the collectives of all layers, without overlap."""

    @property
    def step_seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds) + self.collective_seconds

    @property
    def collective_share(self) -> float:
        return self.collective_seconds / self.step_seconds


def roofline(
    decoder: ShardedDecoder, hardware: Hardware, *, rows: int, slots: int, positions: int, collective_seconds: float
) -> Roofline:
    """Estimate the memory and time of one decode step.

    Args:
      rows: rows of the step, over all token shards.
      slots: sequences in the cache of each token shard.
      positions: positions cached for each sequence.
      collective_seconds: predicted time of the collectives of all layers.
    """
    weights = held_bytes(decoder.parameters)
    pages = slots * -(-positions // PAGE)
    caches = held_bytes(decoder.abstract_caches(dict.fromkeys(decoder.windows, pages), PAGE, slots))
    flops = 2 * rows * sum(_weights_per_token(decoder)) / decoder.placement.mesh.devices.size
    return Roofline(
        weight_bytes=weights,
        cache_bytes=caches,
        memory_seconds=(weights + caches) / hardware.memory_bandwidth * hardware.sharers(decoder.placement),
        compute_seconds=flops / hardware.flops * hardware.sharers(decoder.placement),
        collective_seconds=collective_seconds,
    )


def held_bytes(arrays: Any) -> int:
    """Sum the bytes per device of a tree of arrays or of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)
    )


def _weights_per_token(decoder: ShardedDecoder) -> Iterator[float]:
    """Number of weights of each parameter that one token is multiplied by, experts averaged."""
    for path, parameter in nnx.to_flat_state(decoder.parameters):
        match path:
            case ("stacks", int(group), "unit", int(block), "ffn", "experts", *_):
                yield math.prod(parameter.shape) * _expert_share(decoder.groups[group].unit[block])
            case ("embedding", *_) if not decoder.config.tied_embeddings:
                yield 0
            case _:
                yield math.prod(parameter.shape)


def _expert_share(layer: LayerConfig) -> float:
    assert isinstance(layer.ffn, MoEConfig)
    return layer.ffn.top_k / layer.ffn.experts
