"""Whether a model can be split the way a placement says."""

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
    """Raise `PlacementError`, naming every number that does not divide."""
    split = {part: None for layer in config.layers for part in _split(layer)}
    split["embedding rows", config.vocab_rows, Role.HEADS] = None
    problems = [
        f"{count} {what} do not divide over {placement.describe(role)}"
        for what, count, role in split
        if count % placement.size(role)
    ]
    heads = placement.size(Role.HEADS)
    for shared, kind in dict.fromkeys(chain(*map(_shared, config.layers))):
        if shared % heads and heads % shared:
            over = placement.describe(Role.HEADS)
            problems.append(f"{shared} {kind} neither divide over {over} nor repeat evenly on them")
    if problems:
        raise PlacementError(
            f"the model does not fit the placement: {'; '.join(problems)} "
            "(choose a mesh whose axes divide these numbers)"
        )


def _shared(layer: LayerConfig) -> Iterator[tuple[int, str]]:
    """What several heads of a layer share, and how many of it there are."""
    match layer.attention:
        case AttentionConfig(kv_heads=heads):
            yield heads, "KV heads"
        case DeltaConfig(key_heads=heads):
            yield heads, "key heads"
        case LightningConfig(norm_groups=groups):
            yield groups, "groups of normalised heads"


def _split(layer: LayerConfig) -> Iterator[tuple[str, int, Role]]:
    """What of a layer is split, into how many, by which role."""
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
