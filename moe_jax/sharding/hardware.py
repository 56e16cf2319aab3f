"""Hardware records: the time of collectives from public figures, or from figures that `moe-jax bench` measured.

Seconds of a collective = launches * launch
                        + hops * latency of the slowest link + bytes sent / bandwidth of that link
                        + bytes of the buffer, written and read / memory bandwidth
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from moe_jax.errors import ConfigError
from moe_jax.sharding.placement import Placement
from moe_jax.sharding.traffic import Move

GB, US = 1e9, 1e-6


@dataclass(frozen=True)
class Link:
    """Link between neighbours in the ring of a collective."""

    bandwidth: float
    """Bytes per second that a device sends, while it receives at the same rate."""
    latency: float
    """Seconds of one hop."""

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclass(frozen=True)
class Hardware:
    """Figures of a kind of device and of the links between devices."""

    name: str
    devices_per_host: int
    """Devices connected by the local link: the devices of a host or of an NVLink domain."""
    local: Link
    """Link between devices of a host."""
    remote: Link
    """Link between devices of different hosts."""
    launch: float
    """Seconds that a collective takes without moving bytes."""
    memory: float
    """Bytes of memory of a device."""
    memory_bandwidth: float
    """Bytes per second that a device reads and writes."""
    flops: float
    """Dense bfloat16 operations per second of a device."""
    source: str
    """Source of the figures."""
    shared: bool = False
    """True if the devices of a host share the bandwidths, as virtual devices do."""

    def __post_init__(self) -> None:
        _check_numbers(self)

    def seconds(self, moves: Iterable[Move], placement: Placement) -> float:
        """Estimate the seconds of collectives that run one after the other."""
        return sum(self._seconds(move, placement) for move in moves)

    def _seconds(self, move: Move, placement: Placement) -> float:
        link = self.remote if self.crosses_hosts(move.axes, placement) else self.local
        each = move.sent_bytes / link.bandwidth + 2 * move.buffer_bytes / self.memory_bandwidth
        return move.launches * self.launch + move.hops * link.latency + each * self.sharers(placement)

    def sharers(self, placement: Placement) -> int:
        """Number of devices that share a bandwidth."""
        return min(placement.mesh.devices.size, self.devices_per_host) if self.shared else 1

    def crosses_hosts(self, axes: tuple[str, ...], placement: Placement) -> bool:
        """Return True if devices along these axes are on different hosts. A host has consecutive devices."""
        mesh = placement.mesh
        host = np.arange(mesh.devices.size).reshape(mesh.devices.shape) // self.devices_per_host
        along = tuple(mesh.axis_names.index(axis) for axis in axes)
        return bool(np.any(host != host.min(axis=along, keepdims=True)))


def _check_numbers(record: Link | Hardware) -> None:
    """Check the numbers of a record.

    Raises:
      ValueError: a value is not a number, or not above 0; times may be 0.
    """
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.type in ("float", "int"):
            is_time = field.name in ("launch", "latency")
            if not isinstance(value, int | float) or not (value > 0 or (is_time and value == 0)):
                raise ValueError(f"{field.name} must be a number above 0, got {value!r}")


NCCL = (
    "latencies of ring collectives from NCCL's tuning model (src/graph/tuning.cc: launch 6.6 us, NVLink hop "
    "0.6 us, network hop 2.7 us)"
)
_NVLINK, _NETWORK, _LAUNCH = 0.6 * US, 2.7 * US, 6.6 * US


def _gpu(
    name: str, per_host: int, nvlink: float, network: float, memory: float, hbm: float, tflops: float, source: str
) -> Hardware:
    """Create a record from figures in GB, GB/s and TFLOP/s."""
    return Hardware(
        name=name,
        devices_per_host=per_host,
        local=Link(nvlink * GB, _NVLINK),
        remote=Link(network * GB, _NETWORK),
        launch=_LAUNCH,
        memory=memory * GB,
        memory_bandwidth=hbm * GB,
        flops=tflops * 1e12,
        source=f"{source}; {NCCL}",
    )


KNOWN: Mapping[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        _gpu("a100", 8, 300, 25, 80, 2039, 312, "NVIDIA A100 80GB SXM data sheet; DGX A100, 200 Gb/s a GPU"),
        _gpu("h100", 8, 450, 50, 80, 3350, 989, "NVIDIA H100 SXM data sheet; DGX H100, 400 Gb/s a GPU"),
        _gpu("h200", 8, 450, 50, 141, 4800, 989, "NVIDIA H200 SXM data sheet; DGX H200, 400 Gb/s a GPU"),
        _gpu("b200", 8, 900, 50, 180, 8000, 2250, "NVIDIA DGX B200 data sheet, per GPU, 400 Gb/s a GPU"),
        _gpu("gb200", 72, 900, 50, 186, 8000, 2500, "NVIDIA GB200 NVL72 data sheet, per GPU, 400 Gb/s a GPU"),
        Hardware(
            name="cpu",
            devices_per_host=2**20,
            local=Link(3.0 * GB, 0),
            remote=Link(3.0 * GB, 0),
            launch=430 * US,
            memory=24 * GB,
            memory_bandwidth=11 * GB,
            flops=0.25e12,
            shared=True,
            source="moe-jax bench --calibrate: eight virtual devices of two x86-64 cores, jax 0.10.2, 2026-11-22",
        ),
    )
}


def as_hardware(name: str | Hardware | None) -> Hardware:
    """Return a hardware record.

    Args:
      name: a name in `KNOWN`, the path of a file that `save` wrote, a record, or `None` for the record of
        `jax.devices()`.

    Raises:
      ConfigError: no such record, or a file that holds no record.
    """
    if isinstance(name, Hardware):
        return name
    if name is None:
        return of_kind(jax.devices()[0].device_kind)
    if str(name).lower() in KNOWN:
        return KNOWN[str(name).lower()]
    try:
        raw = json.loads(Path(name).read_text())
        return Hardware(**{**raw, "local": Link(**raw["local"]), "remote": Link(**raw["remote"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"no hardware {name!r}: give one of {', '.join(KNOWN)}, or a file that `moe-jax bench --calibrate` wrote"
        ) from error


def of_kind(device_kind: str) -> Hardware:
    """Return the record for a `jax.Device.device_kind`, or that of an H100 for an unknown accelerator."""
    words = re.findall("[a-z0-9]+", device_kind.lower())
    return next((hardware for name, hardware in KNOWN.items() if name in words), KNOWN["h100"])


def save(hardware: Hardware, path: Path) -> None:
    """Write a record as JSON, for `as_hardware` to read."""
    path.write_text(json.dumps(dataclasses.asdict(hardware), indent=2) + "\n")
