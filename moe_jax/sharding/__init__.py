"""Meshes, placements, ragged rows, typed sums over devices, and the combine strategies.

Everything in moe_jax that says the name of a mesh axis lives here.
"""

from moe_jax.errors import PlacementError, ReductionError
from moe_jax.sharding.collectives import PartialSum
from moe_jax.sharding.combine import Combine, Gathered
from moe_jax.sharding.fit import check_fit
from moe_jax.sharding.hardware import Hardware, as_hardware
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.placement import Placement, Role, as_placement
from moe_jax.sharding.policy import Decision, Policy, RowBytes, Strategy, asked_strategy, choose_combine
from moe_jax.sharding.rows import FINE, Rows, bucket
from moe_jax.sharding.strategies import RaggedCombine, ReduceCombine, ScatterCombine

__all__ = [
    "FINE",
    "Combine",
    "Decision",
    "Gathered",
    "Hardware",
    "PartialSum",
    "Placement",
    "PlacementError",
    "Policy",
    "RaggedCombine",
    "ReduceCombine",
    "ReductionError",
    "Role",
    "RowBytes",
    "Rows",
    "ScatterCombine",
    "Strategy",
    "as_hardware",
    "as_placement",
    "asked_strategy",
    "bucket",
    "check_fit",
    "choose_combine",
    "make_mesh",
]
