"""Explanation of one decode step on a mesh: compiled, not run, so it needs neither weights nor the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_jax.analysis.census import Collective, collectives, count, sent_bytes
from moe_jax.analysis.roofline import Roofline, roofline
from moe_jax.analysis.units import format_bytes
from moe_jax.programs import Programs
from moe_jax.sharding import FINE, Decision, Hardware, Policy, bucket

RUNTIME_BYTES = 2**29
"""Bytes that Python, JAX and compiled programs take in a process, as `bench.memory` measures them."""


@dataclass(frozen=True)
class Explanation:
    """Route, collectives, memory and time of one decode step."""

    devices: str
    device_count: int
    hardware: Hardware
    """Hardware record that the decision and the times are modelled with."""
    placement: str
    counts: tuple[int, ...]
    """Sequences on each token shard."""
    rows: int
    """Rows of all sequences: one each, or one block each for block diffusion."""
    decision: Decision
    layers: int
    collectives: list[Collective]
    temporary_bytes: int
    """Bytes on each device that the compiled program needs besides weights and cache."""
    roofline: Roofline
    free_bytes: float
    """Bytes that are free on each device besides this model."""
    engine_cache_bytes: int | None
    """Bytes on each device of the cache that the engine holds; None without an engine."""

    @property
    def sent_bytes_per_step(self) -> float:
        """Predicted bytes that each device sends in all layers of a step."""
        return self.decision.chosen.sent_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights, cache and temporary arrays on each device."""
        return self.roofline.weight_bytes + self.roofline.cache_bytes + self.temporary_bytes

    @property
    def process_bytes(self) -> int | None:
        """Bytes of a process that holds the engine on its CPU devices; None for accelerators, or without an engine."""
        if self.engine_cache_bytes is None or not self.hardware.shared:
            return None
        held = self.roofline.weight_bytes + self.engine_cache_bytes + self.temporary_bytes
        return self.device_count * held + RUNTIME_BYTES

    @property
    def fits(self) -> bool:
        """True if the devices have the memory."""
        return self.memory_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        return {
            "devices": self.devices,
            "hardware": self.hardware.name,
            "placement": self.placement,
            "counts": list(self.counts),
            "route": self.decision.name,
            "reason": self.decision.reason,
            "candidates": [cost.as_dict() for cost in self.decision.candidates],
            "layers": self.layers,
            "sent_bytes_per_step": self.sent_bytes_per_step,
            "collectives_per_step": dict(count(self.collectives)),
            "asynchronous_collectives_per_step": dict(count(c for c in self.collectives if c.asynchronous)),
            "collective_bytes_per_step": sent_bytes(self.collectives),
            "collectives": [asdict(collective) for collective in self.collectives],
            "memory_bytes": self.memory_bytes,
            "temporary_bytes": self.temporary_bytes,
            "free_bytes": self.free_bytes,
            "engine_cache_bytes": self.engine_cache_bytes,
            "process_bytes": self.process_bytes,
            "fits": self.fits,
            "step_seconds": self.roofline.step_seconds,
            "collective_share": self.roofline.collective_share,
            **asdict(self.roofline),
        }

    def __str__(self) -> str:
        kinds = ", ".join(f"{times} {kind}" for kind, times in count(self.collectives).items()) or "none"
        return (
            f"devices      {self.devices}, modelled as {self.hardware.name}\n"
            f"placement    {self.placement}\n"
            f"route        {self.decision}\n"
            + "".join(f"             {cost}\n" for cost in self.decision.candidates)
            + f"decode step  {self.rows} rows, {self.layers} layers, "
            f"{self.sent_bytes_per_step / 1024:.1f} KiB sent by each device in the layers\n"
            f"collectives  {kinds}; at most {sent_bytes(self.collectives) / 1024:.1f} KiB sent by each device\n"
            f"memory       {self._format_memory()}\n{self._format_engine()}"
            f"time         {self._format_time()}"
        )

    def _format_memory(self) -> str:
        parts = (self.roofline.weight_bytes, self.roofline.cache_bytes, self.temporary_bytes, self.memory_bytes)
        unit, name = (2**30, "GiB") if self.memory_bytes >= 2**30 else (2**20, "MiB")
        weights, cache, temporary, total = (f"{part / unit:.2f}" for part in parts)
        limit = f"{format_bytes(self.free_bytes)} free"
        verdict = f"fits in {limit}" if self.fits else f"exceeds {limit} ({self._remedy()})"
        return f"{weights} weights + {cache} cache + {temporary} temporary = {total} {name} on each device: {verdict}"

    def _format_engine(self) -> str:
        if self.engine_cache_bytes is None:
            return ""
        weights, cache = self.roofline.weight_bytes, self.engine_cache_bytes
        held, all_held = weights + cache, (weights + cache) * self.device_count
        return (
            f"engine       holds {format_bytes(weights)} weights + {format_bytes(cache)} cache = {format_bytes(held)} "
            f"on each device, {format_bytes(all_held)} on all{self._format_process()}\n"
        )

    def _format_process(self) -> str:
        return f"; the process takes about {format_bytes(self.process_bytes)}" if self.process_bytes else ""

    def _remedy(self) -> str:
        free = self.free_bytes - self.roofline.weight_bytes - self.temporary_bytes
        if free <= 0:
            times = self.roofline.weight_bytes / max(self.free_bytes, 1)
            return f"the weights alone need {math.ceil(times)} times the devices"
        share = self.roofline.cache_bytes / free
        return f"1/{bucket(math.ceil(share))} of the positions or sequences would fit"

    def _format_time(self) -> str:
        step, share = self.roofline.step_seconds, self.roofline.collective_share
        return f"at least {step * 1e3:.3f} ms per step, {share:.0%} of it in collectives (predicted, not measured)"


def explain(
    programs: Programs,
    policy: Policy,
    counts: Sequence[int],
    positions: int,
    free_bytes: float | None = None,
    engine_cache_bytes: int | None = None,
) -> Explanation:
    """Compile a decode step and explain it.

    Args:
      counts: sequences on each token shard.
      positions: positions cached for each sequence.
      free_bytes: bytes that are free on each device besides this model; by default the memory of the hardware record.
      engine_cache_bytes: bytes on each device of the cache that an engine holds.
    """
    decoder, capacity, block = programs.decoder, bucket(max(counts), FINE), programs.decoder.config.block
    decision = policy.decide([count * block for count in counts], capacity * block)
    compiled = programs.decode_step(capacity, positions, decision.route)
    memory, rows, seconds = compiled.memory_analysis(), sum(counts) * block, decision.chosen.seconds
    sizes = {"rows": rows, "slots": capacity, "positions": positions}
    return Explanation(
        devices=_format_devices(decoder.placement.mesh.devices),
        device_count=decoder.placement.mesh.devices.size,
        hardware=policy.hardware,
        placement=str(decoder.placement),
        counts=tuple(counts),
        rows=rows,
        decision=decision,
        layers=len(decoder.config.layers),
        collectives=collectives(compiled.as_text() or ""),
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        roofline=roofline(decoder, policy.hardware, **sizes, collective_seconds=seconds),
        free_bytes=policy.hardware.memory if free_bytes is None else free_bytes,
        engine_cache_bytes=engine_cache_bytes,
    )


def evenly(sequences: int, shards: int) -> list[int]:
    """Spread sequences evenly over token shards."""
    return [sequences // shards + (shard < sequences % shards) for shard in range(shards)]


def _format_devices(devices: np.ndarray) -> str:
    kind = devices.flat[0].device_kind
    return f"{devices.size} x {kind}" + (" (virtual)" if kind == "cpu" else "")
