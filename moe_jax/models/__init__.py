"""The decoder that every family shares, assembled from its config."""

from moe_jax.models.batch import Batch, Lines, PageRange, Segment, Shape, pack
from moe_jax.models.decoder import Caches, Decoder
from moe_jax.models.grouping import Group, group_layers
from moe_jax.models.sharded import Parameters, ShardedDecoder, zeros

__all__ = [
    "Batch",
    "Caches",
    "Decoder",
    "Group",
    "Lines",
    "PageRange",
    "Parameters",
    "Segment",
    "Shape",
    "ShardedDecoder",
    "group_layers",
    "pack",
    "zeros",
]
