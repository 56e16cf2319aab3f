"""All tests run on eight virtual CPU devices, through the code path of an accelerator."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # code for tiny shapes need not be fast, but made fast


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests that read compiled programs: compile as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
