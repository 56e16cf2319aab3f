"""Numbers in the units that people read."""

from __future__ import annotations

import pytest

from moe_jax.analysis.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00 MiB"), (3 * 2**19, "1.50 MiB"), (2**30 - 2**20, "1023.00 MiB"), (2**30, "1.00 GiB"),
     (5000 * 2**30, "5,000.00 GiB")],
)  # fmt: skip
def test_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0.0 ms"), (0.00123, "1.2 ms"), (0.34, "0.34 s"), (1234.5, "1,234.50 s")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
