"""What one decode step does on the mesh, found by compiling it; weights are not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.errors import RequestError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import FINE, Decision, Policy, Role, bucket
from moe_jax.sharding.census import Collective, collectives, count


@dataclass(frozen=True)
class Explanation:
    devices: str
    placement: str
    batch_size: int
    decision: Decision
    feed_forwards: int
    """Blocks that combine, one after the other, in a step."""
    collectives: list[Collective]

    def as_dict(self) -> dict[str, Any]:
        return {
            "devices": self.devices,
            "placement": self.placement,
            "batch_size": self.batch_size,
            "combine": self.decision.name,
            "reason": self.decision.reason,
            "candidates": [cost.as_dict() for cost in self.decision.candidates],
            "sent_bytes_per_step": self.sent_bytes_per_step,
            "feed_forwards": self.feed_forwards,
            "collectives_per_step": dict(count(self.collectives)),
        }

    @property
    def sent_bytes_per_step(self) -> float:
        """Bytes that each device sends to gather and to combine, in all blocks of a step."""
        chosen = self.decision.chosen
        return (chosen.gather_bytes + chosen.combine_bytes) * self.feed_forwards

    def __str__(self) -> str:
        candidates = "".join(f"             {cost}\n" for cost in self.decision.candidates)
        kinds = ", ".join(f"{times} {kind}" for kind, times in count(self.collectives).items()) or "none"
        return (
            f"devices      {self.devices}\n"
            f"placement    {self.placement}\n"
            f"combine      {self.decision}\n"
            f"{candidates}"
            f"decode step  {self.batch_size} rows, {self.feed_forwards} feed-forward blocks, "
            f"{self.sent_bytes_per_step / 1024:.1f} KiB sent by each device to gather and combine\n"
            f"collectives  {kinds}"
        )


def explain(programs: Programs, policy: Policy, batch_size: int, positions: int) -> Explanation:
    """Compile a decode step of `batch_size` sequences, spread evenly, over caches of `positions`, and read it.

    Raises:
      RequestError: no sequences.
    """
    if batch_size < 1:
        raise RequestError(f"a decode step needs at least one sequence, got {batch_size}")
    decoder: ShardedDecoder = programs.decoder
    placement, shards = decoder.placement, decoder.placement.size(Role.TOKENS)
    counts = [batch_size // shards + (shard < batch_size % shards) for shard in range(shards)]
    capacity = bucket(max(counts), FINE)
    decision = policy.decide(counts, capacity)
    compiled = programs.decode_step(bucket(max(counts)), bucket(positions), capacity, decision.strategy)
    return Explanation(
        devices=_written(placement.mesh.devices),
        placement=str(placement),
        batch_size=batch_size,
        decision=decision,
        feed_forwards=len(decoder.config.layers),
        collectives=collectives(compiled.as_text() or ""),
    )


def _written(devices: np.ndarray) -> str:
    kind = devices.flat[0].device_kind
    return f"{devices.size} x {kind}" + (" (virtual)" if kind == "cpu" else "")
