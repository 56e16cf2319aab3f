"""Executor: holds weights, caches and slots on the devices, and runs steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from jaxtyping import Array, Int32

from moe_jax.engine.distributed import ProcessGroup
from moe_jax.engine.sizes import Sizes
from moe_jax.models import Caches, Parameters
from moe_jax.programs import PAGE, Programs, RowLogprobs, StepInput
from moe_jax.sharding import Policy, Role, Route


class Executor:
    """Runs the same steps in every process: those that the driver, process 0, schedules."""

    def __init__(
        self,
        programs: Programs,
        parameters: Parameters,
        policy: Policy,
        sizes: Sizes,
        pages: Mapping[int | None, int],
        process_group: ProcessGroup,
    ) -> None:
        """
        Args:
          pages: number of cache pages of each token shard, for each window of the decoder.
        """
        self.programs = programs
        self._process_group = process_group
        self._parameters, self._policy, self._sizes = parameters, policy, sizes
        self._pages = pages
        self._route = cache(self._decide)
        self.reset()

    def reset(self) -> None:
        """Replace caches and slots by empty ones; a step that failed may have donated them."""
        self._caches: Caches = []  # free the old caches first
        self._caches = self.programs.decoder.empty_caches(self._pages, PAGE, self._sizes.slots)
        self._slots = self.programs.empty_slots(self._sizes.slots, self._sizes.positions)

    def run(self, step_input: StepInput) -> tuple[Int32[Array, "shards*L W"], RowLogprobs | None]:
        """Driver: run a step in all processes. Return the packed `SampledTokens` and the scores of targets; reading
        either blocks."""
        self._process_group.broadcast(step_input)
        return self.execute(step_input)

    def execute(self, step_input: StepInput) -> tuple[Int32[Array, "shards*L W"], RowLogprobs | None]:
        """Run this process's part of a step."""
        route = self._route(step_input.batch.capacity)
        emitted, scored, self._slots, self._caches = self.programs.run(
            self._parameters, self._caches, self._slots, step_input, route
        )
        return emitted, scored

    def _decide(self, capacity: int) -> Route:
        """Choose the route for full and even token shards: the scheduler keeps shards even, and its buffers hold any
        counts."""
        return self._policy.decide([capacity] * self._policy.placement.size(Role.TOKENS), capacity).route
