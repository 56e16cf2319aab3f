"""Check that a placement can split a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from moe_jax.config import (
    AttentionConfig,
    DeltaConfig,
    DenseConfig,
    LayerConfig,
    LightningConfig,
    MambaConfig,
    ModelConfig,
)
from moe_jax.errors import PlacementError
from moe_jax.sharding.placement import Placement, Role


def check_divisibility(config: ModelConfig, placement: Placement) -> None:
    """Check that the devices of each role divide the dimensions that the role splits.

    Raises:
      PlacementError: names every size that does not divide.
    """
    split = {part: None for layer in config.layers for part in _split_sizes(layer)}
    split["embedding rows", config.vocab_rows, Role.HEADS] = None
    problems = [
        f"{size} {what} do not divide over {placement.describe(role)}"
        for what, size, role in split
        if size % placement.size(role)
    ]
    heads = placement.size(Role.HEADS)
    for groups, what in dict.fromkeys(chain(*map(_head_groups, config.layers))):
        if groups % heads and heads % groups:
            over = placement.describe(Role.HEADS)
            problems.append(f"{groups} {what} neither divide over {over} nor repeat evenly on them")
    if problems:
        raise PlacementError(
            f"the model does not fit the placement: {'; '.join(problems)} "
            "(choose a mesh whose axes divide these numbers)"
        )


def _head_groups(layer: LayerConfig) -> Iterator[tuple[int, str]]:
    """Number and name of the groups in which heads of a layer share something: keys and values, or a norm."""
    match layer.attention:
        case AttentionConfig(kv_heads=heads):
            yield heads, "KV heads"
        case DeltaConfig(key_heads=heads):
            yield heads, "key heads"
        case LightningConfig(norm_groups=groups):
            yield groups, "groups of normalised heads"


def _split_sizes(layer: LayerConfig) -> Iterator[tuple[str, int, Role]]:
    """Name, size and role of each dimension of a layer that a role splits."""
    attention, ffn = layer.attention, layer.ffn
    if isinstance(attention, MambaConfig):
        yield "channels of a state space", attention.channels, Role.HEADS
    else:
        yield "attention heads", attention.heads, Role.HEADS
    if isinstance(ffn, DenseConfig):
        yield "units of dense MLP width", ffn.width, Role.PARTIAL
        return
    yield "experts", ffn.experts, Role.EXPERTS
    yield "units of expert width", ffn.width, Role.FFN
    if ffn.shared is not None:
        yield "units of shared-expert width", ffn.shared.width, Role.PARTIAL
