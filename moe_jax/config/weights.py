"""How weights are held while they are used: in the compute dtype, or in eight bits with scales."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moe_jax.config.numbers import check_positive
from moe_jax.errors import ConfigError


class WeightDtype(StrEnum):
    """What users ask for."""

    EXACT = "exact"
    """In the compute dtype."""
    FLOAT8 = "float8_e4m3fn"
    INT8 = "int8"


@dataclass(frozen=True)
class Quantization:
    """The matrices of attention and feed-forwards in eight bits, symmetric: a weight is its number times its scale."""

    dtype: WeightDtype
    block: int | None = None
    """Neighbouring inputs of an output that share a scale; `None` for all of them."""

    def __post_init__(self) -> None:
        check_positive(self, "block")
        if self.dtype is WeightDtype.EXACT:
            raise ConfigError("weights in the compute dtype are not quantised: say None")

    @property
    def largest(self) -> int:
        """The largest number."""
        return {WeightDtype.FLOAT8: 448, WeightDtype.INT8: 127}[self.dtype]


def as_weight_dtype(asked: str) -> WeightDtype:
    """Raises ConfigError for a name that is none."""
    if asked not in list(WeightDtype):
        raise ConfigError(f"weight_dtype must be one of {', '.join(WeightDtype)}, got {asked!r}")
    return WeightDtype(asked)
