"""All tests run on eight virtual CPU devices, through the code path of an accelerator."""

import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # code for tiny shapes need not be fast, but made fast
if jax.__version_info__ < (0, 11):  # newer ones do not know the flags
    FASTER = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FASTER

LONG_TO_COMPILE = 0.2
"""Seconds from which on a program is kept."""
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers, and the processes that tests start, inherit it
    COMPILED = TemporaryDirectory(prefix="moe_jax_compiled_")
    """Of this run of the tests alone: what one process has compiled, others find."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(LONG_TO_COMPILE)
    PATHS = [str(Path(__file__).parent / "processes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", LONG_TO_COMPILE)

gc.freeze()  # tracing makes so many objects that looking for garbage among all that was imported takes a while
gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def unkept() -> Iterator[None]:
    """For tests whose programs no other test has: writing one takes a twentieth of the time that making it takes."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LONG_TO_COMPILE)


@pytest.fixture
def anew(unkept: None) -> Iterator[None]:
    """For tests that read compiled programs: none is one that was kept, for those are printed without some of their
    lines. That they are compiled without optimizations changes their machine code alone."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
