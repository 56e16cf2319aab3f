"""The compiled steps of a decoder."""

from moe_jax.programs.parcel import Parcel
from moe_jax.programs.programs import PAGE, Programs
from moe_jax.programs.steps import Asked, Drawn, Scored, Slots, Turn

__all__ = ["PAGE", "Asked", "Drawn", "Parcel", "Programs", "Scored", "Slots", "Turn"]
