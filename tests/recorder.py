"""An engine without devices: its executor records steps instead of running them, and every token is 0."""

from __future__ import annotations

from typing import Any

import decoders
import jax.numpy as jnp
import numpy as np

from moe_jax.engine import Engine, Options, make_limits, make_sizes
from moe_jax.engine.executor import Executor
from moe_jax.programs import Programs, SampledTokens, StepInput
from moe_jax.scheduler import Scheduler

DECODE_STEPS = 8


class Recorder(Executor):
    """An executor that records the size of each step."""

    def __init__(self) -> None:
        self.programs = Programs(decoders.decoder("dp8_ep8"))
        self.weight_bytes = self.cache_bytes = 0
        self.capacities: list[int] = []
        """Rows of a token shard in each dispatch."""

    def run(self, step_input: StepInput) -> Any:
        self.capacities.append(step_input.batch.capacity)
        tokens = np.zeros((len(step_input.slots), DECODE_STEPS), np.int32)
        counts = step_input.limits if step_input.limits is not None else step_input.samples
        parts = (tokens, tokens.astype(np.float32), tokens[..., :0], tokens[..., :0], np.asarray(counts, np.int32))
        return np.asarray(SampledTokens(*map(jnp.asarray, parts)).pack()), None


def recorded(positions: int, slots: int, pages: int) -> tuple[Engine, Recorder]:
    """Make an engine of eight token shards, each with `slots` slots and `pages` pages."""
    recorder = Recorder()
    decoder = recorder.programs.decoder
    options = Options(positions, max_batch_size=8 * slots, prefill_tokens=positions, decode_steps=DECODE_STEPS)
    sizes = make_sizes(options, decoder)
    limits = make_limits(options, decoder, sizes, {None: pages})
    return Engine(Scheduler(limits), recorder, sizes, decoder.placement), recorder
