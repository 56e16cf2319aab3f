"""Decoder that all families share, assembled from a config."""

from moe_jax.models.batch import BatchShape, PageRange, Segment, Segments, pack
from moe_jax.models.decoder import Caches, Decoder
from moe_jax.models.grouping import Group, group_layers
from moe_jax.models.sharded import Parameters, ShardedDecoder, zeros

__all__ = [
    "BatchShape",
    "Caches",
    "Decoder",
    "Group",
    "PageRange",
    "Parameters",
    "Segment",
    "Segments",
    "ShardedDecoder",
    "group_layers",
    "pack",
    "zeros",
]
