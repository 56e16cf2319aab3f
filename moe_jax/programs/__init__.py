"""The compiled steps of a decoder."""

from moe_jax.programs.denoising import BlockSlots, BlockTurn, Pace
from moe_jax.programs.parcel import Parcel
from moe_jax.programs.programs import PAGE, Programs
from moe_jax.programs.steps import Asked, Drawn, Scored, Slots, Turn

__all__ = ["PAGE", "Asked", "BlockSlots", "BlockTurn", "Drawn", "Pace", "Parcel", "Programs", "Scored", "Slots", "Turn"]
