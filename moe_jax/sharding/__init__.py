"""Meshes, placements, ragged rows, typed sums over devices, and the combine strategies.

Everything in moe_jax that says the name of a mesh axis lives here.
"""

from moe_jax.errors import PlacementError, ReductionError
from moe_jax.sharding.collectives import PartialSum
from moe_jax.sharding.combine import Combine, Gathered, ReduceCombine, ScatterCombine
from moe_jax.sharding.fit import check_fit
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.placement import Placement, Role, as_placement
from moe_jax.sharding.policy import Decision, asked_strategy, choose_combine, decide
from moe_jax.sharding.rows import Rows, bucket

__all__ = [
    "Combine",
    "Decision",
    "Gathered",
    "PartialSum",
    "Placement",
    "PlacementError",
    "ReduceCombine",
    "ReductionError",
    "Role",
    "Rows",
    "ScatterCombine",
    "as_placement",
    "asked_strategy",
    "bucket",
    "check_fit",
    "choose_combine",
    "decide",
    "make_mesh",
]
