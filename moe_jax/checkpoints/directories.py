"""New directories that appear only when they are complete."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moe_jax.errors import CheckpointError


def check_new(path: Path) -> None:
    """Raise `CheckpointError` if `path` exists. Call it before long work whose result goes there."""
    if path.exists() or path.is_symlink():
        raise CheckpointError(f"{path} exists already: name a new directory, or remove this one")


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `path` when the block ends without an error.

    After an error the temporary directory is removed, and nothing appears at `path`. A killed process leaves it; the
    next process on the same machine that writes to `path` removes it.

    Raises:
      CheckpointError: `path` exists.
    """
    path = Path(path)
    check_new(path)
    start = f"{path.name}.unfinished-{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        if not psutil.pid_exists(int(left.name.removeprefix(start))):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = path.with_name(f"{start}{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
