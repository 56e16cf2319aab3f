"""Options of a run on several processes, and the setup of such a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moe_jax.engine.distributed import ProcessGroup

DEFAULT_CACHE = Path.home() / ".cache" / "moe_jax"
"""Directory of compiled programs."""


@dataclass(frozen=True)
class ProcessOptions:
    """The place of this process among the processes of a run."""

    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="Join the other processes that JAX detects (SLURM, Open MPI, Kubernetes, TPU pods)."
        ),
    ] = False
    coordinator: Annotated[
        str | None, typer.Option(help="HOST:PORT of process 0.", show_default="a single process, or detected")
    ] = None
    num_processes: Annotated[int | None, typer.Option(help="Number of processes.", show_default="detected")] = None
    process_id: Annotated[int | None, typer.Option(help="Number of this process, from 0.", show_default="detected")] = (
        None
    )

    @contextmanager
    def join(self) -> Iterator[ProcessGroup]:
        """Join the other processes, if there are any.

        Raises:
          ProcessGroupError: the processes cannot be joined.
        """
        from moe_jax.engine.distributed import SingleProcess, join

        if not self.distributed and self.coordinator is self.num_processes is self.process_id is None:
            yield SingleProcess()
            return
        use_compilation_cache(None)  # processes that compile together must all compile, or all find the program cached
        with _results_apart(), join(self.coordinator, self.num_processes, self.process_id) as process_group:
            yield process_group


def use_compilation_cache(directory: Path | None) -> None:
    """Keep compiled programs in `directory`, or nowhere, unless JAX_COMPILATION_CACHE_DIR says otherwise."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", None if directory is None else str(directory))


@contextmanager
def _results_apart() -> Iterator[None]:
    """Send the output of libraries, such as the messages of Gloo, to standard error.

    The output of this program stays on standard output.
    """
    sys.stdout.flush()
    out, results = os.dup(1), sys.stdout
    with open(out, "w", encoding=results.encoding) as sys.stdout:  # noqa: PTH123
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(out, 1)
            sys.stdout = results
