"""Holds weights, caches and slots on the devices, and has orders carried out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from jaxtyping import Array, Int32

from moe_jax.distributed import Crew
from moe_jax.engine.block_orders import BlockOrder
from moe_jax.engine.orders import Order
from moe_jax.engine.sizes import Sizes
from moe_jax.models import Caches, Parameters
from moe_jax.programs import PAGE, Programs, Scored
from moe_jax.sharding import Policy, Role, Route


class Executor:
    """Every process has one; they carry out the same orders, those of process 0."""

    def __init__(
        self,
        programs: Programs,
        parameters: Parameters,
        policy: Policy,
        sizes: Sizes,
        pages: Mapping[int | None, int],
        crew: Crew,
    ) -> None:
        """
        Args:
          pages: of each token shard, for each of the decoder's windows.
        """
        self.programs = programs
        self._crew = crew
        self._parameters, self._policy, self._sizes = parameters, policy, sizes
        self._pages = pages
        self._route = cache(self._decide)
        self.start_over()

    def start_over(self) -> None:
        """Empty caches and slots; a step that failed may have taken the old ones with it."""
        self._caches: Caches = []  # before there are others
        self._caches = self.programs.decoder.empty_caches(self._pages, PAGE, self._sizes.slots)
        self._slots = self.programs.empty_slots(self._sizes.slots, self._sizes.positions)

    def run(self, order: Order) -> tuple[Int32[Array, "shards*L W"], Scored | None]:
        """Have it run by all processes. What is drawn comes joined; it is waited for when it is read."""
        self._crew.tell(order)
        return self.obey(order)

    def obey(self, order: Order) -> tuple[Int32[Array, "shards*L W"], Scored | None]:
        """This process's part of it."""
        route, state = self._route(order.turn.batch.rows.capacity), (self._parameters, self._caches, self._slots)
        if isinstance(order, BlockOrder):
            steps = {"most": order.most, "route": route, "asked": order.asked}
            run = self.programs.denoise(*state, order.turn, order.budgets, **steps)
        elif order.budgets is None:
            run = self.programs.advance(*state, order.turn, route=route, asked=order.asked)
        else:
            most = self._sizes.decode_steps
            run = self.programs.decode(*state, order.turn, order.budgets, most=most, route=route, asked=order.asked)
        drawn, scored, self._slots, self._caches = run
        return drawn, scored

    def _decide(self, capacity: int) -> Route:
        """How full steps of this size go through the layers; the scheduler keeps shards even, and the buffers then hold
        any counts."""
        return self._policy.decide([capacity] * self._policy.placement.size(Role.TOKENS), capacity).route
