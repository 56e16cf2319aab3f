"""Weight dtypes: the compute dtype, or eight bits with scales."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


class WeightDtype(StrEnum):
    """Values of the `weight_dtype` option."""

    EXACT = "exact"
    """The compute dtype."""
    FLOAT8 = "float8_e4m3fn"
    INT8 = "int8"


@dataclass(frozen=True)
class Quantization:
    """Symmetric eight-bit quantization of attention and feed-forward matrices: a weight is its number times its scale.

    Raises:
      ConfigError: `dtype` is `EXACT`, or `block` is not positive.
    """

    dtype: WeightDtype
    """Dtype of the quantized numbers."""
    block: int | None = None
    """Number of neighbouring inputs that share a scale; `None` for one scale for each output."""

    def __post_init__(self) -> None:
        check_positive(self, "block")
        if self.dtype is WeightDtype.EXACT:
            raise ConfigError(
                "Quantization.dtype must be float8_e4m3fn or int8, got exact: for exact weights, say None"
            )

    @property
    def largest(self) -> int:
        """Largest quantized number."""
        return {WeightDtype.FLOAT8: 448, WeightDtype.INT8: 127}[self.dtype]


def as_weight_dtype(name: str) -> WeightDtype:
    """Parse the name of a weight dtype.

    Raises:
      ConfigError: an unknown name.
    """
    if name not in list(WeightDtype):
        raise ConfigError(f"weight_dtype must be one of {', '.join(WeightDtype)}, got {name!r}")
    return WeightDtype(name)
