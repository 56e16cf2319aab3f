"""Compiled steps of a decoder: their inputs, outputs, and sampling."""

from moe_jax.config.engine_options import PAGE
from moe_jax.programs.diffusion_input import DenoisingSchedule, DiffusionSlots, DiffusionStepInput
from moe_jax.programs.outputs import RowLogprobs, SampledTokens
from moe_jax.programs.packed_buffer import PackedBuffer
from moe_jax.programs.programs import Programs
from moe_jax.programs.step_input import FROM_BUFFER, Slots, StepFlags, StepInput

__all__ = [
    "FROM_BUFFER",
    "PAGE",
    "DenoisingSchedule",
    "DiffusionSlots",
    "DiffusionStepInput",
    "PackedBuffer",
    "Programs",
    "RowLogprobs",
    "SampledTokens",
    "Slots",
    "StepFlags",
    "StepInput",
]
