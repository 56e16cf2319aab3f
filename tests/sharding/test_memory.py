"""Memory that is free on the devices of a mesh."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from moe_jax.sharding import Placement, free_memory, memory

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 16 GiB of available memory, and the directory of its control groups."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * GIB))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "none")
    return tmp_path


@pytest.mark.parametrize(("mesh", "devices"), [("data=1", 1), ("expert=2", 2), ("data=2,expert=4", 8)])
def test_virtual_devices_share_the_memory_of_the_machine(machine: Path, mesh: str, devices: int) -> None:
    assert free_memory(Placement.parse(mesh)) == 16 * GIB / devices


V1 = "memory/a/memory.limit_in_bytes"


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        ("0::/\n", {"memory.max": "max"}, 16),
        ("0::/\n", {"memory.max": 4 * GIB, "memory.current": 3 * GIB}, 1),
        (
            "0::/\n",
            {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "memory.stat": f"a 1\ninactive_file {GIB}"},
            2,
        ),
        ("0::/a/b\n", {"a/memory.max": 8 * GIB, "a/memory.current": 0, "a/b/memory.max": "max"}, 8),
        ("0::/a/b\n", {"a/memory.max": 8 * GIB, "a/b/memory.max": 2 * GIB}, 2),
        ("1:name=systemd:/x\n5:cpu,memory:/a\n", {V1: 6 * GIB, "memory/a/memory.usage_in_bytes": GIB}, 5),
        ("5:memory:/a/b\n", {V1: 3 * GIB}, 3),
        ("5:cpu:/a\n", {V1: 1}, 16),
    ],
)
def test_control_groups_limit_the_memory(
    machine: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, object], free: int
) -> None:
    for name, text in files.items():
        (machine / name).parent.mkdir(parents=True, exist_ok=True)
        (machine / name).write_text(str(text))
    (machine / "own").write_text(own)
    monkeypatch.setattr(memory, "OWN_CGROUP", machine / "own")
    assert memory.free_host_memory() == free * GIB


def test_accelerators_have_what_jax_may_allocate_and_does_not_use() -> None:
    def device(limit: int, in_use: int) -> SimpleNamespace:
        stats = {"bytes_limit": limit, "bytes_in_use": in_use}
        return SimpleNamespace(process_index=0, platform="gpu", memory_stats=lambda: stats)

    silent = SimpleNamespace(process_index=0, platform="gpu", memory_stats=lambda: None, device_kind="NVIDIA H200")
    elsewhere = SimpleNamespace(process_index=1, platform="gpu", memory_stats=lambda: pytest.fail("not addressable"))
    for devices, free in (
        ([device(60 * GIB, 0), device(60 * GIB, 50 * GIB)], 10 * GIB),
        ([silent, elsewhere], 141e9),
        ([device(60 * GIB, 70 * GIB), silent], -10 * GIB),
    ):
        placement = SimpleNamespace(mesh=SimpleNamespace(devices=np.array(devices)))
        assert free_memory(placement) == free  # type: ignore[arg-type]
