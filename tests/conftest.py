"""All tests run on eight virtual CPU devices, through the code path of an accelerator."""

import os
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # code for tiny shapes need not be fast, but made fast
if jax.__version_info__ < (0, 11):  # newer ones do not know the flags
    FASTER = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FASTER


@pytest.fixture
def optimized() -> Iterator[None]:
    """For tests that read compiled programs: compile as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
