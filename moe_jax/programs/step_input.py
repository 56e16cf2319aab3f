"""Input of one dispatch, and the state of running requests that stays on the devices between dispatches.

S  slots of a token shard     P  positions of a sequence     L  segments of a token shard     T  its rows
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from moe_jax.kernels.forward_batch import ForwardBatch
from moe_jax.programs.sampling import SamplingMetadata

FROM_BUFFER = -1
"""Token id of a row whose token the devices read from the token buffer: the host may not know it yet."""

Columns = TypeVar("Columns", bound=tuple[Any, ...])
"""Named tuple of arrays with one row per request."""
AnySlots = TypeVar("AnySlots", bound="Slots")


@dataclass(frozen=True)
class StepFlags:
    """Outputs that a step computes besides greedy tokens. Each combination compiles to another program."""

    sampling: bool = False
    """True if some request is not decoded greedily."""
    top_logprobs: int = 0
    """Number of most likely tokens returned with their log-probabilities."""
    logits: bool = False
    """True if the logits after each scored row are returned."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """State of each running request, on the devices.

    The host can therefore plan a step before it knows the tokens of the step before.
    """

    token_buffer: Int32[Array, "S P"]
    """Tokens of each request, by position."""
    sampling: SamplingMetadata
    """Sampling parameters of each request."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """Input of one dispatch: one step, or a loop of decode steps.

    On the host, NumPy arrays that hold all token shards one after the other; process 0 sends this object to the
    workers. Inside `shard_map`, arrays of this device's token shard.
    """

    batch: ForwardBatch
    """Rows of the first step; rows of decoding requests have the token `FROM_BUFFER`."""
    slots: Int32[Array, "L"]
    """Slot of each segment; S for a segment without rows."""
    samples: Bool[Array, "L"]
    """True for a segment whose last row samples a token."""
    sampling: SamplingMetadata | None
    """Sampling parameters for the slots of the last segments, those of prompts."""
    targets: Int32[Array, "T"] | None = None
    """Token whose log-probability after each row is returned; None if the step returns none."""
    limits: Int32[Array, "L"] | None = None
    """Number of tokens that each segment may emit in a loop of decode steps; None for a single step."""
    flags: StepFlags = field(default=StepFlags(), metadata={"static": True})
    max_steps: int = field(default=1, metadata={"static": True})
    """Upper bound on the steps of this dispatch (K)."""

    @property
    def prompt_slots(self) -> Int32[Array, "prompts"]:
        """Slots of the last segments, those of prompts."""
        assert self.sampling is not None
        return self.slots[-self.sampling.seed.shape[0] :]


def feed(slots: AnySlots, step_input: StepInput, batch: ForwardBatch) -> tuple[Int32[Array, "T"], AnySlots]:
    """Return the token of each row. Write prompts to the token buffer, and read the tokens of decoding rows from it."""
    buffer, is_prompt = slots.token_buffer, batch.tokens != FROM_BUFFER
    pad_slot = buffer.shape[0]
    row_slots = step_input.slots.at[batch.segments].get(mode="fill", fill_value=pad_slot)
    buffered = buffer.at[row_slots, batch.positions].get(mode="clip")
    into = jnp.where(is_prompt, row_slots, pad_slot)
    buffer = buffer.at[into, batch.positions].set(batch.tokens, mode="drop")
    return jnp.where(is_prompt, batch.tokens, buffered), replace(slots, token_buffer=buffer)


def rows_of(columns: Columns, slots: Int32[Array, "L"]) -> Columns:
    """Read the rows of some slots; a slot out of range reads any row."""
    return type(columns)(*(column.at[slots].get(mode="clip") for column in columns))


def update_rows(columns: Columns, slots: Int32[Array, "L"], new: Columns) -> Columns:
    """Overwrite the rows of some slots; a slot out of range writes nothing."""
    return type(columns)(*(column.at[slots].set(rows, mode="drop") for column, rows in zip(columns, new, strict=True)))
