"""Placements: the mesh axes that play each of four roles, and the axes over which a sum is partial.

    role      dimension that its axes split
    TOKENS    the token rows of attention, with their KV cache (attention data parallelism)
    HEADS     the attention heads and the vocabulary (attention tensor parallelism)
    EXPERTS   the experts
    FFN       the intermediate width of each expert

TOKENS and HEADS are disjoint and together cover the mesh; EXPERTS and FFN are disjoint. Two more roles follow:

    PARTIAL   EXPERTS and FFN together: the axes over which a feed-forward output is a partial sum. They split the
              widths of dense MLPs and shared experts, which every token visits.
    KV_HEADS  HEADS if there are at least as many KV heads as devices, else no axis: fewer KV heads are replicated.

Axes of size 1 split nothing and are left out everywhere, so no program has a collective over one device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum, auto

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import PlacementError
from moe_jax.sharding import collectives
from moe_jax.sharding.mesh import AXES, DATA, EXPERT, TENSOR, Device, make_mesh, renamed

_ROLES = ("tokens", "heads", "experts", "ffn")
"""Roles that a `Placement` is given; the others follow from them."""


class Role(StrEnum):
    """Logical axis of a dimension; the value is its name in Flax's `out_sharding`, such as `"experts"`."""

    TOKENS = auto()
    HEADS = auto()
    EXPERTS = auto()
    FFN = auto()
    PARTIAL = auto()
    KV_HEADS = auto()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the axes that play each role. The default is data-parallel attention with expert parallelism.

    Raises:
      PlacementError: a mesh with other axes, or roles that overlap, name unknown axes or leave an axis out.
    """

    mesh: Mesh
    tokens: tuple[str, ...] = (DATA, EXPERT)
    heads: tuple[str, ...] = (TENSOR,)
    experts: tuple[str, ...] = (EXPERT,)
    ffn: tuple[str, ...] = (TENSOR,)

    def __post_init__(self) -> None:
        if self.mesh.axis_names != AXES or set(self.mesh.axis_types) != {AxisType.Auto}:
            raise PlacementError(
                f"a placement needs a mesh of the axes {', '.join(AXES)}, all of type Auto, got {self.mesh}: make the "
                "mesh with moe_jax.sharding.make_mesh, or the placement with Placement.from_mesh"
            )
        for role in _ROLES:
            if not isinstance(getattr(self, role), tuple):
                raise PlacementError(f"{role} must be a tuple of axis names, got {getattr(self, role)!r}")
        for first, second in (("tokens", "heads"), ("experts", "ffn")):
            if overlap := set(getattr(self, first)) & set(getattr(self, second)):
                raise PlacementError(f"an axis cannot split both {first} and {second}: {sorted(overlap)} does")
        if unknown := set(self.tokens + self.heads + self.experts + self.ffn) - set(AXES):
            raise PlacementError(f"unknown mesh axes {sorted(unknown)}: the axes are {', '.join(AXES)}")
        if missing := [a for a in AXES if a not in self.tokens + self.heads and self.mesh.shape[a] > 1]:
            sizes = ", ".join(f"{axis}={self.mesh.shape[axis]}" for axis in missing)
            raise PlacementError(f"tokens and heads must cover the mesh: {sizes} splits neither; add it to one of them")

    @classmethod
    def parse(cls, text: str, devices: Sequence[Device] | None = None) -> Placement:
        """Parse a placement written as `"data=2,expert=4"`, with any roles other than the defaults after semicolons.

        For example `"data=2,expert=2,tensor=2; tokens=data; heads=expert,tensor; experts=data,expert"`.

        Raises:
          PlacementError: the text has another form, or see `Placement`.
        """
        sizes, *clauses = text.split(";")
        roles = {}
        for clause in clauses:
            role, equals, axes = (part.strip() for part in clause.partition("="))
            if role not in _ROLES or not equals or role in roles:
                raise PlacementError(
                    f"cannot read {clause.strip()!r} in {text!r}: after the mesh, write each of "
                    f"{', '.join(_ROLES)} at most once, with its axes, as in 'tokens=data,expert'"
                )
            roles[role] = tuple(axis for axis in (name.strip() for name in axes.split(",")) if axis)
        return cls(make_mesh(sizes, devices), **roles)

    @classmethod
    def from_mesh(cls, mesh: Mesh, axes: Mapping[str, str | Sequence[str]] | None = None) -> Placement:
        """Create a placement from a mesh with axes of any names and types, such as `jax.make_mesh` makes.

        Args:
          axes: axes of `mesh` for each of `data`, `expert` and `tensor`, as in `{"data": "dp", "expert": ("x", "y")}`;
            several are joined. By default each is the axis of the same name. Axes left out have size 1.

        Raises:
          PlacementError: the mesh has other axes, or an axis of more than one device is left out.
        """
        return cls(renamed(mesh, axes))

    @classmethod
    def from_sizes(cls, devices: Sequence[Device] | int, attention_dp: int, ep: int, replicas: int = 1) -> Placement:
        """Create a placement from parallelism sizes, as vLLM and SGLang take them.

        Args:
          devices: the devices, or the number of JAX's devices to use.
          attention_dp: token shards per replica; the remaining factor is attention tensor parallelism.
          ep: expert shards per replica; the remaining factor splits the experts' widths.
          replicas: copies of the model, each with its own part of the tokens.

        Raises:
          PlacementError: sizes that do not divide each other.
        """
        count, chosen = (devices, None) if isinstance(devices, int) else (len(devices), devices)
        sizes = f"{count} devices, {replicas} replicas, attention_dp={attention_dp}, ep={ep}"
        if min(count, replicas, attention_dp, ep) < 1:
            raise PlacementError(f"impossible sizes ({sizes}): each must be at least 1")
        per_replica, rest = divmod(count, replicas)
        small, large = sorted((attention_dp, ep))
        if rest or large % small or per_replica % large:
            raise PlacementError(
                f"impossible sizes ({sizes}): replicas must divide the devices; the smaller of attention_dp and ep "
                f"must divide the larger, and the larger must divide the {per_replica} devices of a replica"
            )
        middle = ("tokens", "ffn") if attention_dp > ep else ("heads", "experts")
        factors = [
            (replicas, ("tokens",)),
            (small, ("tokens", "experts")),
            (large // small, middle),
            (per_replica // large, ("heads", "ffn")),
        ]
        factors = [(size, roles) for size, roles in factors if size > 1]
        if len(factors) > len(AXES):
            raise PlacementError(
                f"impossible sizes ({sizes}): they need {len(factors)} mesh axes, there are {len(AXES)}"
            )
        factors = [(1, ("tokens",))] * (len(AXES) - len(factors)) + factors
        axes = dict(zip(AXES, factors, strict=True))
        mesh = make_mesh({axis: size for axis, (size, _) in axes.items()}, chosen)
        return cls(mesh, *(tuple(axis for axis, (_, roles) in axes.items() if role in roles) for role in _ROLES))

    def axes(self, role: Role) -> tuple[str, ...]:
        """Return the axes that play a role, without axes of size 1, in mesh order."""
        names = {
            Role.TOKENS: self.tokens,
            Role.HEADS: self.heads,
            Role.EXPERTS: self.experts,
            Role.FFN: self.ffn,
            Role.PARTIAL: self.experts + self.ffn,
            Role.KV_HEADS: self.heads,
        }[role]
        return tuple(axis for axis in AXES if axis in names and self.mesh.shape[axis] > 1)

    @property
    def rules(self) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
        """Logical axis rules for Flax.

        Use them as `with nnx.logical_axis_rules(placement.rules): nnx.get_partition_spec(state)`. They split KV heads
        over all heads devices, which JAX refuses if there are fewer KV heads; `moe_jax.layers.specs` replicates them.
        """
        return tuple((role.value, self.axes(role) or None) for role in Role)

    def size(self, role: Role) -> int:
        """Number of parts into which a role splits."""
        return self.device_count(self.axes(role))

    def device_count(self, axes: tuple[str, ...]) -> int:
        """Number of devices along the given axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def index(self, role: Role) -> jax.Array | int:
        """Index of the part of a role that this device holds. Only inside `shard_map`."""
        return collectives.axis_index(self.axes(role))

    def expert_shards(self, along: tuple[str, ...]) -> np.ndarray | jax.Array:
        """Index of the expert shard of each device along the given axes. Only inside `shard_map`.

        Along the other axes, the devices have the coordinates of this device.
        """
        sizes = [self.mesh.shape[axis] for axis in along]
        count = self.device_count(along)
        coordinates = dict(zip(along, np.indices(sizes, np.int32).reshape(len(along), count), strict=True))
        shard = np.zeros(count, np.int32)
        for axis in self.axes(Role.EXPERTS):
            index = coordinates[axis] if axis in coordinates else collectives.axis_index((axis,))
            shard = shard * self.mesh.shape[axis] + index
        return shard

    @property
    def device(self) -> Device:
        """Device that programs are compiled for; all devices of a mesh are of one kind."""
        return self.mesh.devices.flat[0]

    @property
    def has_ragged_all_to_all(self) -> bool:
        """True if the backend has `ragged_all_to_all`; XLA's CPU backend has not."""
        return self.device.platform != "cpu"

    @property
    def scatter_axes(self) -> tuple[str, ...]:
        """PARTIAL axes that also split the tokens: gathered over before a feed-forward, scattered over after it."""
        return tuple(axis for axis in self.axes(Role.PARTIAL) if axis in self.tokens)

    @property
    def sum_axes(self) -> tuple[str, ...]:
        """PARTIAL axes that do not split the tokens: summed over after a feed-forward."""
        return tuple(axis for axis in self.axes(Role.PARTIAL) if axis not in self.tokens)

    @property
    def gather_shards(self) -> int:
        """Number of token shards that gather into one feed-forward buffer."""
        return self.device_count(self.scatter_axes)

    def spec(self, dims: Sequence[Role | None], shape: Sequence[int]) -> PartitionSpec:
        """Return the spec of an array whose trailing dimensions have the roles `dims`.

        Leading dimensions (stacked layers) are not split.
        """
        stacked = len(shape) - len(dims)
        return PartitionSpec(
            *(None,) * stacked,
            *(self._dim_axes(role, size) for role, size in zip(dims, shape[stacked:], strict=True)),
        )

    def _dim_axes(self, role: Role | None, size: int) -> tuple[str, ...] | None:
        if role is None or (role is Role.KV_HEADS and size < self.size(Role.HEADS)):
            return None
        return self.axes(role) or None

    def sharding(self, dims: Sequence[Role | None], shape: Sequence[int]) -> NamedSharding:
        """Return the sharding on the mesh with the spec of `spec`."""
        return NamedSharding(self.mesh, self.spec(dims, shape))

    def describe(self, role: Role) -> str:
        """Describe a role in a message, as in `8 devices (experts: data=2, expert=4)`."""
        sizes = ", ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes(role))
        return f"{self.size(role)} devices ({role.name.lower()}: {sizes})"

    def __str__(self) -> str:
        mesh = ",".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        return mesh + "".join(f"; {role}={','.join(getattr(self, role))}" for role in _ROLES)


def as_placement(mesh: str | Mapping[str, int] | Mesh | Placement | None) -> Placement:
    """Convert text, axis sizes or a mesh to a placement; `None` puts all devices on `expert`.

    Raises:
      PlacementError: see `Placement`, `Placement.parse` and `make_mesh`.
    """
    match mesh:
        case Placement():
            return mesh
        case str():
            return Placement.parse(mesh)
        case Mesh():
            return Placement.from_mesh(mesh)
        case _:
            return Placement(make_mesh(mesh))
