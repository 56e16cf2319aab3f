"""Explanation of one decode step on a mesh: compiled, not run, so it needs neither weights nor the devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_jax.analysis.census import Collective, collectives, count, sent_bytes
from moe_jax.analysis.roofline import Roofline, roofline
from moe_jax.programs import Programs
from moe_jax.sharding import FINE, Decision, Hardware, Policy, bucket


@dataclass(frozen=True)
class Explanation:
    """Route, collectives, memory and time of one decode step."""

    devices: str
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

    @property
    def sent_bytes_per_step(self) -> float:
        """Predicted bytes that each device sends in all layers of a step."""
        return self.decision.chosen.sent_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights, cache and temporary arrays on each device."""
        return self.roofline.weight_bytes + self.roofline.cache_bytes + self.temporary_bytes

    @property
    def fits(self) -> bool:
        """True if a device has the memory."""
        return self.memory_bytes <= self.hardware.memory

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
            f"memory       {self._format_memory()}\n"
            f"time         {self._format_time()}"
        )

    def _format_memory(self) -> str:
        parts = (self.roofline.weight_bytes, self.roofline.cache_bytes, self.temporary_bytes, self.memory_bytes)
        unit, name = (2**30, "GiB") if self.memory_bytes >= 2**30 else (2**20, "MiB")
        weights, cache, temporary, total = (f"{part / unit:.2f}" for part in parts)
        limit = f"{self.hardware.memory / 2**30:.1f} GiB"
        verdict = f"fits in {limit}" if self.fits else f"exceeds {limit} ({self._remedy()})"
        return f"{weights} weights + {cache} cache + {temporary} temporary = {total} {name} on each device: {verdict}"

    def _remedy(self) -> str:
        free = self.hardware.memory - self.roofline.weight_bytes - self.temporary_bytes
        if free <= 0:
            times = self.roofline.weight_bytes / self.hardware.memory
            return f"the weights alone need {math.ceil(times)} times the devices"
        share = self.roofline.cache_bytes / free
        return f"1/{bucket(math.ceil(share))} of the positions or sequences would fit"

    def _format_time(self) -> str:
        step, share = self.roofline.step_seconds, self.roofline.collective_share
        return f"at least {step * 1e3:.3f} ms per step, {share:.0%} of it in collectives (predicted, not measured)"


def explain(programs: Programs, policy: Policy, counts: Sequence[int], positions: int) -> Explanation:
    """Compile a decode step and explain it.

    Args:
      counts: sequences on each token shard.
      positions: positions cached for each sequence.
    """
    decoder, capacity, block = programs.decoder, bucket(max(counts), FINE), programs.decoder.config.block
    decision = policy.decide([count * block for count in counts], capacity * block)
    compiled = programs.decode_step(capacity, positions, decision.route)
    memory = compiled.memory_analysis()
    return Explanation(
        devices=_format_devices(decoder.placement.mesh.devices),
        hardware=policy.hardware,
        placement=str(decoder.placement),
        counts=tuple(counts),
        rows=sum(counts) * block,
        decision=decision,
        layers=len(decoder.config.layers),
        collectives=collectives(compiled.as_text() or ""),
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        roofline=roofline(
            decoder,
            policy.hardware,
            rows=sum(counts) * block,
            slots=capacity,
            positions=positions,
            collective_seconds=decision.chosen.seconds,
        ),
    )


def evenly(sequences: int, shards: int) -> list[int]:
    """Spread sequences evenly over token shards."""
    return [sequences // shards + (shard < sequences % shards) for shard in range(shards)]


def _format_devices(devices: np.ndarray) -> str:
    kind = devices.flat[0].device_kind
    return f"{devices.size} x {kind}" + (" (virtual)" if kind == "cpu" else "")
