"""Input and device state of models that decode by block diffusion.

S  slots of a token shard     B  positions of a block     D  segments of a token shard that decode a block each
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from moe_jax.config import BlockDiffusion
from moe_jax.programs.step_input import Slots, StepInput
from moe_jax.sharding.rows import on_host

MASKED = -1
"""Entry of the token buffer at a masked position."""
FINISHED = 2**30
"""Begin of the current block of a request that has all its tokens, after any position."""


class DenoisingSchedule(NamedTuple):
    """Schedule by which the blocks of each request are unmasked."""

    threshold: Float[Array, "requests"]
    """Probability above which a token is unmasked at once."""
    steps: Int32[Array, "requests"]
    """Upper bound on the steps that unmask a block, from 1 to B."""
    ends: Int32[Array, "requests"]
    """Position after the last token that the request may emit."""

    @classmethod
    def of(cls, threshold: float, steps: int, end: int) -> DenoisingSchedule:
        """Make the schedule of one request, on the host."""
        columns = ((threshold, np.float32), (steps, np.int32), (end, np.int32))
        return cls(*(on_host(np.array([value], dtype)) for value, dtype in columns))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiffusionSlots(Slots):
    """Slots that also hold each request's current block."""

    schedule: DenoisingSchedule
    begins: Int32[Array, "S"]
    """First position of the current block; `FINISHED` if the request has all its tokens."""
    steps: Int32[Array, "S"]
    """Steps that the current block has taken."""
    logprobs: Float[Array, "S B"]
    """Log-probability of each token of the current block at the step that unmasked it."""

    @classmethod
    def of(cls, slot: Slots, block: int) -> DiffusionSlots:
        """Extend the shapes of one slot."""
        number, logprobs = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, block), jnp.float32)
        return cls(slot.token_buffer, slot.sampling, DenoisingSchedule.of(1, 1, 0), number, number, logprobs)  # type: ignore[arg-type]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiffusionStepInput(StepInput):
    """Input of a dispatch over blocks. The first D segments are blocks, the others pieces of prompts.

    `limits` has the shape `[D]`: the position up to which each decoding request has pages. `samples` is true for the
    last segment of a prompt: the request's first block is decoded from the next step on.
    """

    schedule: DenoisingSchedule | None = None
    """Schedules for the slots of the last segments, those of prompts."""
    diffusion: BlockDiffusion = field(default=BlockDiffusion(1, 0), metadata={"static": True})


class CurrentBlocks(NamedTuple):
    """Current block of each decoding segment."""

    slots: Int32[Array, "D"]
    positions: Int32[Array, "D B"]
    alive: Bool[Array, "D"]
    """True if the segment has a block and the block has pages."""


def current_blocks(slots: DiffusionSlots, step_input: DiffusionStepInput) -> CurrentBlocks:
    """Look up the block of each decoding segment."""
    assert step_input.limits is not None
    limits, block = step_input.limits, step_input.diffusion.block
    decoding = step_input.slots[: limits.shape[0]]
    begins = slots.begins.at[decoding].get(mode="fill", fill_value=FINISHED)
    return CurrentBlocks(decoding, begins[:, None] + jnp.arange(block), begins + block <= limits)
