"""Turn a plan of requests that decode by block diffusion into the input of a dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.config import BlockDiffusion
from moe_jax.engine.generation import Generation
from moe_jax.engine.input_builder import StepInputBuilder, joined
from moe_jax.engine.sizes import Sizes, StepSize
from moe_jax.models import Segment
from moe_jax.programs import DenoisingSchedule, DiffusionStepInput, StepFlags
from moe_jax.scheduler import Chunk, Decodes, Request
from moe_jax.sharding import Placement
from moe_jax.sharding.rows import on_host

NO_SCHEDULE = DenoisingSchedule.of(1, 1, 0)


class DiffusionInputBuilder(StepInputBuilder):
    """Fill the arrays of a dispatch over blocks.

    The devices know the current block of each request. A plan bounds the blocks by the pages of the request.
    """

    def __init__(
        self,
        size: StepSize,
        sizes: Sizes,
        shards: int,
        generation: Callable[[Request], Generation],
        *,
        diffusion: BlockDiffusion,
    ) -> None:
        super().__init__(size, sizes, shards, generation)
        self._diffusion = diffusion
        self._schedules = [[NO_SCHEDULE] * size.prompt_segments for _ in range(shards)]

    def build(self, placement: Placement, flags: StepFlags) -> DiffusionStepInput:
        built: dict[str, Any] = vars(super().build(placement, flags)) | {"limits": on_host(self._limits.reshape(-1))}
        return DiffusionStepInput(**built, schedule=joined(self._schedules), diffusion=self._diffusion)

    @property
    def _emitting_segments(self) -> int:
        return self._size.decoding

    def _mark_decoding(self, shard: int, decoding: slice, decodes: Decodes) -> None:
        """Let each request decode up to the last position that has a page."""
        self._limits[shard, decoding] = np.add(decodes.positions, decodes.steps)

    def _end_prompt(self, shard: int, segment: int, request: Request) -> None:
        """Begin the first block of a request; it is decoded from the next step on."""
        self._samples[shard, segment] = True

    def _prompt(self, shard: int, number: int, row: int, chunk: Chunk, start: int, end: int) -> Segment:
        self._schedules[shard][number] = self._generation(chunk.request).schedule
        return super()._prompt(shard, number, row, chunk, start, end)
