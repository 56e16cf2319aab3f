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

QUICK = Path(__file__).parent / "quick.txt"

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"run only the tests that {QUICK.name} lists")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the quick tier, and refuse a line of its list that matches none."""
    if not config.getoption("--quick"):
        return
    kept: dict[pytest.Item, None] = {}
    for line in QUICK.read_text().splitlines():
        start, *words = line.removeprefix("- ").split() or ["#"]
        if start == "#":
            continue
        found = [item for item in items if item.nodeid.startswith(start) and all(word in item.nodeid for word in words)]
        if not found and not config.option.file_or_dir:
            raise pytest.UsageError(f"{QUICK.name}: no test matches {line!r}")
        if line.startswith("- "):
            kept = {item: None for item in kept if item not in found}
        else:
            kept |= dict.fromkeys(found)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


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
