"""What one decode step does on the mesh, found by compiling it; weights are not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.errors import RequestError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import Combine, Decision, Role, Rows, bucket, decide
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
            "sent_bytes_per_combine": self.decision.sent_bytes,
            "sent_bytes_per_step": self.sent_bytes_per_step,
            "feed_forwards": self.feed_forwards,
            "collectives_per_step": dict(count(self.collectives)),
        }

    @property
    def sent_bytes_per_step(self) -> float:
        """Bytes that each device sends to combine, in all blocks of a step."""
        return self.decision.sent_bytes[self.decision.name] * self.feed_forwards

    def __str__(self) -> str:
        kinds = ", ".join(f"{times} {kind}" for kind, times in count(self.collectives).items()) or "none"
        return (
            f"devices      {self.devices}\n"
            f"placement    {self.placement}\n"
            f"combine      {self.decision}\n"
            f"decode step  {self.batch_size} rows, {self.feed_forwards} feed-forward blocks, "
            f"{self.sent_bytes_per_step / 1024:.1f} KiB sent by each device to combine\n"
            f"collectives  {kinds}"
        )


def explain(programs: Programs, asked: Combine | None, batch_size: int, positions: int) -> Explanation:
    """Compile a decode step of `batch_size` sequences, spread evenly, over caches of `positions`, and read it.

    Raises:
      RequestError: no sequences.
    """
    if batch_size < 1:
        raise RequestError(f"a decode step needs at least one sequence, got {batch_size}")
    decoder: ShardedDecoder = programs.decoder
    placement, shards = decoder.placement, decoder.placement.size(Role.TOKENS)
    counts = [batch_size // shards + (shard < batch_size % shards) for shard in range(shards)]
    rows = Rows.of(counts, placement)
    decision = decide(asked, placement, rows, decoder.row_bytes)
    strategy = decision.strategy
    compiled = programs.decode_step(bucket(max(counts)), bucket(positions), strategy.sized(rows), strategy)
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
