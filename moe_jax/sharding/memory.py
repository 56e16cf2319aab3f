"""Free memory of the devices of a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils

from moe_jax.sharding.hardware import of_kind
from moe_jax.sharding.mesh import Device
from moe_jax.sharding.placement import Placement

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory(placement: Placement) -> float:
    """Return the bytes that are free on each device of a mesh, now; the least of all devices.

    An accelerator has what JAX may allocate and does not use. CPU devices share the memory that the machine, and the
    control groups of this process, leave. All processes get the same number.
    """
    here = jax.process_index()
    devices = [device for device in placement.mesh.devices.flat if device.process_index == here]
    on_cpu = devices[0].platform == "cpu"
    free = free_host_memory() / len(devices) if on_cpu else min(map(_free_on, devices))
    return float(multihost_utils.process_allgather(np.float32(free)).min()) if jax.process_count() > 1 else free


def _free_on(device: Device) -> float:
    if stats := device.memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return of_kind(device.device_kind).memory


def free_host_memory() -> float:
    """Return the bytes of memory that this process can still get."""
    return min([psutil.virtual_memory().available, *_free_in_cgroups()])


def _free_in_cgroups() -> Iterator[int]:
    """Yield the bytes that each control group of this process leaves, for versions 1 and 2 of control groups."""
    for line in OWN_CGROUP.read_text().splitlines() if OWN_CGROUP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = CGROUPS / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            if root in (each, *each.parents) and (most := _number(each / limit)) is not None:
                yield most - (_number(each / usage) or 0) + _reclaimable(each / "memory.stat", cache)


def _number(path: Path) -> int | None:
    """Read a number; `None` if there is no limit, or no such file."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdecimal() else None


def _reclaimable(path: Path, name: str) -> int:
    """Return the bytes of files in memory, which the kernel drops when programs need memory."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == name)
