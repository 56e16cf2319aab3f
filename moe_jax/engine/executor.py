"""Executor: holds weights, caches and slots on the devices, and runs steps."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Array, Int32

from moe_jax.analysis.roofline import held_bytes
from moe_jax.engine.sizes import Sizes
from moe_jax.models import Caches, Parameters
from moe_jax.programs import PAGE, Programs, RowLogprobs, StepInput
from moe_jax.sharding import Policy, Role, Route


class Executor:
    """This process's part of the model; every process runs the same steps."""

    def __init__(
        self, programs: Programs, parameters: Parameters, policy: Policy, sizes: Sizes, pages: Mapping[int | None, int]
    ) -> None:
        """
        Args:
          pages: number of cache pages on each token shard, for each attention window of the decoder.
        """
        self.programs = programs
        self.weight_bytes = held_bytes(parameters)
        """Bytes of the weights on each device."""
        self._parameters, self._policy, self._sizes = parameters, policy, sizes
        self._pages = pages
        self._routes: dict[int, Route] = {}
        self.reset()

    def reset(self) -> None:
        """Replace caches and slots by empty ones; a step that failed may have donated them."""
        self._caches: Caches = []  # free the old caches first
        self._caches = self.programs.decoder.empty_caches(self._pages, PAGE, self._sizes.slots)
        self.cache_bytes = held_bytes(self._caches)
        """Bytes of the caches on each device."""
        self._slots = self.programs.empty_slots(self._sizes.slots, self._sizes.positions)

    def run(self, step_input: StepInput) -> tuple[Int32[Array, "shards*L W"], RowLogprobs | None]:
        """Run a step. Return the packed `SampledTokens` and the scores of targets; reading either blocks."""
        capacity = step_input.batch.capacity
        if capacity not in self._routes:
            self._routes[capacity] = self._decide(capacity)
        route = self._routes[capacity]
        emitted, scored, self._slots, self._caches = self.programs.run(
            self._parameters, self._caches, self._slots, step_input, route
        )
        return emitted, scored

    def _decide(self, capacity: int) -> Route:
        """Choose the route for full token shards, since the scheduler keeps their numbers of rows even."""
        return self._policy.decide([capacity] * self._policy.placement.size(Role.TOKENS), capacity).route
