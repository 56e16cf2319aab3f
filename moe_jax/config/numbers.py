"""Range check shared by all configurations."""

from __future__ import annotations

import math

from moe_jax.errors import ConfigError


def check_positive(config: object, *names: str) -> None:
    """Raise `ConfigError` unless each named field is positive and finite, or `None`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{type(config).__name__}.{name} must be positive and finite, got {value}")
