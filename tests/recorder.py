"""An engine without devices: steps are remembered in place of being run, and every token is 0."""

from __future__ import annotations

from typing import Any

import decoders
import jax.numpy as jnp
import numpy as np

from moe_jax.engine import Engine, Options
from moe_jax.engine.executor import Executor
from moe_jax.engine.orders import Order
from moe_jax.programs import Drawn, Programs
from moe_jax.scheduler import Scheduler

DECODE_STEPS = 8


class Recorder(Executor):
    def __init__(self) -> None:
        self.programs = Programs(decoders.decoder("dp8_ep8"))
        self.capacities: list[int] = []
        """Rows of a token shard, of each step or dispatch."""

    def run(self, order: Order) -> Any:
        self.capacities.append(order.turn.batch.rows.capacity)
        tokens = np.zeros((len(order.turn.slots), DECODE_STEPS), np.int32)
        given = order.budgets if order.budgets is not None else order.turn.draws
        parts = (tokens, tokens.astype(np.float32), tokens[..., :0], tokens[..., :0], np.asarray(given, np.int32))
        return np.asarray(Drawn(*map(jnp.asarray, parts)).joined()), None


def recorded(positions: int, slots: int, pages: int) -> tuple[Engine, Recorder]:
    """On eight token shards, with so many slots and pages each."""
    recorder = Recorder()
    decoder = recorder.programs.decoder
    options = Options(positions, max_batch_size=8 * slots, prefill_tokens=positions, decode_steps=DECODE_STEPS)
    sizes = options.sizes(decoder)
    limits = options.limits(decoder, sizes, {None: pages})
    return Engine(Scheduler(limits), recorder, sizes, decoder.placement), recorder
