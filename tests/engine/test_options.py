"""Settings of an engine."""

from __future__ import annotations

import pytest

from moe_jax.engine import Options
from moe_jax.errors import RequestError


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "0.8"])
def test_cache_memory_must_be_a_share(share: float) -> None:
    with pytest.raises(RequestError, match="cache_memory must be a share above 0 and at most 1, got"):
        Options(64, cache_memory=share)
