"""Meshes, placements, ragged rows, typed sums over devices, and the combine strategies.

No other package of moe_jax writes the name of a mesh axis.
"""

from moe_jax.errors import PlacementError, ReductionError
from moe_jax.sharding.all_to_all import AllToAllCombine
from moe_jax.sharding.collectives import PartialSum
from moe_jax.sharding.combine import Combine, Gathered
from moe_jax.sharding.divisibility import check_divisibility, placement_for
from moe_jax.sharding.encoding import DEFAULT_GATHER_DTYPE, EXACT, Encoding, as_encoding
from moe_jax.sharding.hardware import Hardware, as_hardware
from moe_jax.sharding.memory import free_memory
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.placement import Placement, Role, as_placement
from moe_jax.sharding.policy import AUTO, Decision, Policy, Route, Strategy, as_residual_layout, as_strategy
from moe_jax.sharding.residual import ResidualLayout, SplitResidual, WholeResidual
from moe_jax.sharding.rows import FINE, Rows, bucket
from moe_jax.sharding.strategies import RaggedCombine, ReduceCombine, ScatterCombine
from moe_jax.sharding.traffic import RowBytes

__all__ = [
    "AUTO",
    "DEFAULT_GATHER_DTYPE",
    "EXACT",
    "FINE",
    "AllToAllCombine",
    "Combine",
    "Decision",
    "Encoding",
    "Gathered",
    "Hardware",
    "PartialSum",
    "Placement",
    "PlacementError",
    "Policy",
    "RaggedCombine",
    "ReduceCombine",
    "ReductionError",
    "ResidualLayout",
    "Role",
    "Route",
    "RowBytes",
    "Rows",
    "ScatterCombine",
    "SplitResidual",
    "Strategy",
    "WholeResidual",
    "as_encoding",
    "as_hardware",
    "as_placement",
    "as_residual_layout",
    "as_strategy",
    "bucket",
    "check_divisibility",
    "free_memory",
    "make_mesh",
    "placement_for",
]
