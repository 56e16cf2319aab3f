"""The device mesh: always the three axes `data`, `expert`, `tensor`; any of them may have size 1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, Mesh

from moe_jax.errors import PlacementError

Device: TypeAlias = Any
"""`jax.Device`, which type checkers do not accept as a type."""

DATA, EXPERT, TENSOR = AXES = ("data", "expert", "tensor")


def parse_sizes(text: str) -> dict[str, int]:
    """Parse axis sizes written as `"data=2,expert=4"`.

    Raises:
      PlacementError: the text has another form.
    """
    sizes = {}
    for item in text.split(","):
        axis, _, size = (part.strip() for part in item.partition("="))
        if axis not in AXES or not size.isdecimal() or axis in sizes:
            raise PlacementError(
                f"cannot read {item.strip()!r} in mesh {text!r}: write each of {', '.join(AXES)} at most once, "
                "with a size, as in 'data=2,expert=4'"
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: str | Mapping[str, int] | None = None, devices: Sequence[Device] | None = None) -> Mesh:
    """Make a mesh of the given axis sizes over the first devices that fill it.

    Args:
      sizes: `"data=2,expert=4"` or `{"data": 2, "expert": 4}`; axes left out have size 1. `None` puts all devices on
        `expert`.
      devices: by default `jax.devices()`.

    Raises:
      PlacementError: an unknown axis, a size below 1, more devices than there are, or a process whose devices are all
        left out.
    """
    devices = jax.devices() if devices is None else list(devices)
    if sizes is None:
        sizes = {EXPERT: len(devices)}
    elif isinstance(sizes, str):
        sizes = parse_sizes(sizes)
    if not isinstance(sizes, Mapping) or not all(isinstance(size, int) for size in sizes.values()):
        raise PlacementError(f"cannot make a mesh from {sizes!r}: give 'data=2,expert=4' or {{'data': 2, 'expert': 4}}")
    if unknown := set(sizes) - set(AXES):
        raise PlacementError(f"unknown mesh axes {sorted(unknown)}: the axes are {', '.join(AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    needed = math.prod(shape)
    written = ",".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if min(shape) < 1:
        raise PlacementError(f"every axis of mesh {written} must have a size of at least 1")
    if needed > len(devices):
        raise PlacementError(
            f"mesh {written} needs {needed} devices, there are {len(devices)}: use a smaller mesh, or run on more "
            "devices (on a CPU: --cpu-devices N, or jax.config.update('jax_num_cpu_devices', N) before JAX is used)"
        )
    if idle := {device.process_index for device in devices} - {device.process_index for device in devices[:needed]}:
        raise PlacementError(
            f"mesh {written} leaves processes without devices ({', '.join(map(str, sorted(idle)))}): use a larger "
            "mesh, or start fewer processes"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


def renamed(mesh: Mesh, axes: Mapping[str, str | Sequence[str]] | None) -> Mesh:
    """Return a mesh of the axes `data`, `expert` and `tensor` over the devices of a mesh with other axes.

    Args:
      axes: axes of `mesh` for each of the three, which are joined; by default the axis of the same name.

    Raises:
      PlacementError: `mesh` has other axes, or an axis of more than one device is left out or used twice.
    """
    mapping = {axis: axis for axis in mesh.axis_names} if axes is None else axes
    parts = {axis: (names,) if isinstance(names, str) else tuple(names) for axis, names in mapping.items()}
    used = [name for axis in AXES for name in parts.get(axis, ())]
    unused = [name for name in mesh.axis_names if name not in used]
    if (
        set(parts) - set(AXES)
        or set(used) - set(mesh.axis_names)
        or len(set(used)) < len(used)
        or any(mesh.shape[name] > 1 for name in unused)
    ):
        raise PlacementError(
            f"cannot use the axes {dict(mesh.shape)} as {dict(mapping)}: map each of {', '.join(AXES)} to axes of the "
            "mesh, each once, as in Placement.from_mesh(mesh, {'data': 'dp', 'expert': ('x', 'y')})"
        )
    order = [mesh.axis_names.index(name) for name in used + unused]
    shape = tuple(math.prod(mesh.shape[name] for name in parts.get(axis, ())) for axis in AXES)
    return Mesh(mesh.devices.transpose(order).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
