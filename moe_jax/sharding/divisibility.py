"""Check that a placement can split a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

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
from moe_jax.sharding.mesh import DATA, EXPERT, TENSOR
from moe_jax.sharding.placement import Placement, Role, as_placement

logger = logging.getLogger(__name__)


def placement_for(config: ModelConfig, mesh: str | Mapping[str, int] | Mesh | Placement | None) -> Placement:
    """Convert text, axis sizes or a mesh to a placement for a model.

    `None` uses all devices: as many as divide the model on `expert`, and the others on `data`.

    Raises:
      PlacementError: see `as_placement`.
    """
    if mesh is not None:
        return as_placement(mesh)
    devices = len(jax.devices())
    text = fitting_mesh(config, devices)
    if not text.startswith(EXPERT) and devices > 1:
        logger.info("mesh %s, since the model does not divide over %s=%d", text, EXPERT, devices)
    return as_placement(text)


def fitting_mesh(config: ModelConfig, devices: int) -> str:
    """Return the mesh of a number of devices with the largest `expert` axis that divides the model, as text."""
    for experts in range(devices, 1, -1):
        if devices % experts == 0:
            sizes = {DATA: devices // experts, EXPERT: experts, TENSOR: 1}
            mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3)
            if not _problems(config, Placement(cast(Mesh, mesh))):
                return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
    return f"{DATA}={devices}"


def check_divisibility(config: ModelConfig, placement: Placement) -> None:
    """Check that the devices of each role divide the dimensions that the role splits.

    Raises:
      PlacementError: names every size that does not divide, and a mesh of as many devices that fits.
    """
    if problems := _problems(config, placement):
        fitting = fitting_mesh(config, placement.mesh.size)
        raise PlacementError(
            f"the model does not fit the placement: {'; '.join(problems)} (choose axes that divide these numbers, such "
            f"as mesh '{fitting}')"
        )


def _problems(config: ModelConfig, placement: Placement) -> list[str]:
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
    return problems


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
