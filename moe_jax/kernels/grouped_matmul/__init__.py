"""A matmul for each group of rows, with work that grows with the rows and not with the number of groups."""
# ruff: noqa: I001  (a line for each name, with what it is)

from moe_jax.kernels.grouped_matmul.dispatch import GroupedMatmul  # protocol of the backends
from moe_jax.kernels.grouped_matmul.dispatch import grouped_matmul  # differentiable, by any backend
from moe_jax.kernels.grouped_matmul.dispatch import grouped_matmul_on  # the backend for a device
from moe_jax.kernels.grouped_matmul.loop import LoopGroupedMatmul  # CPU
from moe_jax.kernels.grouped_matmul.pallas import PallasGroupedMatmul  # GPU
from moe_jax.kernels.grouped_matmul.ragged_dot import RaggedDotGroupedMatmul  # TPU, and the reference

__all__ = [
    "GroupedMatmul",
    "LoopGroupedMatmul",
    "PallasGroupedMatmul",
    "RaggedDotGroupedMatmul",
    "grouped_matmul",
    "grouped_matmul_on",
]
