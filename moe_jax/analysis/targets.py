"""GPU targets to compile for on a machine without GPUs: `jax.experimental.topologies` with XLA's GPU compiler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from moe_jax.errors import PlacementError
from moe_jax.sharding.hardware import KNOWN, Hardware
from moe_jax.sharding.mesh import Device, make_mesh, parse_sizes
from moe_jax.sharding.placement import Placement

COMPILER_OPTIONS = {"xla_gpu_enable_cub_radix_sort": False}
"""Compiler options for targets: without a GPU, XLA cannot query the workspace of CUB's sort, so it takes its own."""


@dataclass(frozen=True)
class Chip:
    """Figures of a GPU that XLA's compiler needs besides its memory, from NVIDIA's white papers."""

    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    links: int


_HOPPER = Chip((9, 0), 132, 1.98, 50 * 2**20, 228 * 2**10, 18)
_BLACKWELL = Chip((10, 0), 148, 1.965, 126 * 2**20, 228 * 2**10, 18)
CHIPS = {
    "a100": Chip((8, 0), 108, 1.41, 40 * 2**20, 164 * 2**10, 12),
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": _BLACKWELL,
    "gb200": _BLACKWELL,
}


def target_devices(name: str, count: int) -> Sequence[Device]:
    """Create `count` devices that programs can be compiled for but not run on, host after host.

    Args:
      name: a key of `CHIPS`.

    Raises:
      PlacementError: no such target, `count` below 1 or not filling whole hosts, or no GPU compiler installed.
    """
    hardware = _hardware(name)
    if count < 1:
        raise PlacementError(f"a mesh needs at least one device of {hardware.name}, got {count}")
    per_host = min(count, hardware.devices_per_host)
    if count % per_host:
        raise PlacementError(
            f"{count} devices do not fill hosts of {per_host} {hardware.name}: use a multiple of {per_host}"
        )
    _require_compiler()
    config = _target_config(hardware, CHIPS[hardware.name])
    topology = f"1x{count // per_host}x{per_host}"
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=topology).devices


def target_placement(name: str, placement: str | None) -> Placement:
    """Create a placement on devices of a target.

    Args:
      name: a key of `CHIPS`.
      placement: as for `Placement.parse`; `None` puts the devices of one host on `expert`.

    Raises:
      PlacementError: see `target_devices` and `Placement`.
    """
    if placement is None:
        return Placement(make_mesh(devices=target_devices(name, _hardware(name).devices_per_host)))
    sizes = parse_sizes(placement.partition(";")[0])
    return Placement.parse(placement, target_devices(name, math.prod(sizes.values())))


def _hardware(name: str) -> Hardware:
    if name.lower() not in CHIPS:
        raise PlacementError(f"no target {name!r}: the targets are {', '.join(CHIPS)}")
    return KNOWN[name.lower()]


def _require_compiler() -> None:
    if find_spec("jax_cuda12_plugin") is None:
        raise PlacementError(
            "compiling for a GPU needs XLA's GPU compiler, but neither a GPU nor CUDA: pip install --no-deps "
            f"jax-cuda12-pjrt=={jax.__version__} jax-cuda12-plugin=={jax.__version__}"
        )


def _target_config(hardware: Hardware, chip: Chip) -> str:
    """Write a GpuTargetConfigProto in text format."""
    major, minor = chip.capability
    extension = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {chip.shared_bytes_per_core}
  shared_memory_per_block_optin: {chip.shared_bytes_per_core - 1024}
  threads_per_core_limit: 2048
  core_count: {chip.cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {math.floor(hardware.memory_bandwidth)}
  l2_cache_size: {chip.l2_bytes}
  clock_rate_ghz: {chip.clock_ghz}
  device_memory_size: {math.floor(hardware.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA {hardware.name.upper()}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: {chip.links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {hardware.name.upper()}"
"""
