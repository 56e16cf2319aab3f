"""What all numbers of a config must be."""

from __future__ import annotations

import math

from moe_jax.errors import ConfigError


def check_positive(owner: object, *names: str) -> None:
    """Raise `ConfigError` for a field that is not positive and finite; one that is `None` has nothing to check."""
    for name in names:
        value = getattr(owner, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{type(owner).__name__}.{name} must be positive and finite, got {value}")
