"""Setup of all tests: eight virtual CPU devices, which take the code path of an accelerator."""

import gc
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # tiny shapes: compile time matters, run time does not
if jax.__version_info__ < (0, 11):  # newer versions do not know these flags
    COMPILE_FASTER = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + COMPILE_FASTER

QUICK = Path(__file__).parent / "quick.txt"

MIN_COMPILE_SECONDS = 0.2
"""Compile time in seconds from which on a program is written to the compilation cache."""
if "PYTEST_XDIST_WORKER" not in os.environ:  # xdist workers, and the processes that tests start, inherit the variables
    CACHE = TemporaryDirectory(prefix="moe_jax_compiled_")
    """Compilation cache that the processes of this test run share."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(MIN_COMPILE_SECONDS)
    PATHS = [str(Path(__file__).parent / "processes"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(PATHS)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)

gc.freeze()  # tracing makes many objects: each collection would otherwise scan all imported modules
gc.set_threshold(20_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"run only the tests that {QUICK.name} lists")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--quick`, keep the tests that the list names. A line of the list that matches no test is an error."""
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


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Undo the setup of the log by a command that ran in this process."""
    yield
    logger = logging.getLogger("moe_jax")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def no_cache_writes() -> Iterator[None]:
    """Write no program to the compilation cache, for tests whose programs no other test compiles.

    Writing a program takes a twentieth of the time that compiling it takes.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


@pytest.fixture
def fresh_compilation(no_cache_writes: None) -> Iterator[None]:
    """Read no program from the compilation cache, for tests that read the text of programs.

    Cached programs print without some of their lines. The disabled optimizations change the machine code only, not the
    text.
    """
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    yield
    jax.config.update("jax_compilation_cache_include_metadata_in_key", False)
