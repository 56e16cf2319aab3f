"""The `moe-jax` application: its commands, its devices, its log and its error messages.

JAX is imported when a command runs: help, version and wrong options answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer
from tqdm import tqdm

import moe_jax
from moe_jax.cli.bench import bench
from moe_jax.cli.convert import convert
from moe_jax.cli.eval import evaluate
from moe_jax.cli.generate import generate
from moe_jax.cli.plan import plan
from moe_jax.cli.selftest import selftest
from moe_jax.cli.train import train
from moe_jax.errors import MoEJaxError

COMMANDS = {
    "generate": generate,
    "eval": evaluate,
    "selftest": selftest,
    "train": train,
    "convert": convert,
    "plan": plan,
    "bench": bench,
}
"""Commands by name, in the order of `moe-jax --help`."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True)
class Setup:
    """Options of the program itself."""

    cpu_devices: int
    log_level: int

    def apply(self) -> None:
        """Set up the devices, the compilation cache and the log."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA otherwise reports its progress on standard error
        import jax

        from moe_jax.cli.processes import DEFAULT_CACHE, use_compilation_cache

        jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        use_compilation_cache(DEFAULT_CACHE)
        logger = logging.getLogger("moe_jax")
        logger.handlers[:] = [LogLines()]
        logger.setLevel(self.log_level)


SETUP: ContextVar[Setup] = ContextVar("SETUP")
"""Options of the program, from their parsing until the command runs."""


class LogLines(logging.Handler):
    """Log handler that writes to standard error, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"moe-jax: {self.format(record)}", file=sys.stderr)


def _show_version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"moe-jax {moe_jax.__version__}")
        raise typer.Exit


@app.callback()
def configure(
    cpu_devices: Annotated[
        int, typer.Option(help="Number of virtual CPU devices on a machine without accelerators.", min=1)
    ] = 8,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every detail to standard error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors alone.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Decode Mixture-of-Experts language models in batches on a JAX mesh."""
    SETUP.set(Setup(cpu_devices, logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO))


def _set_up(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def run(**values: Any) -> None:
        SETUP.get().apply()
        command(**values)

    return run


for name, command in COMMANDS.items():
    app.command(name)(_set_up(command))


def main() -> None:
    """Run the command line.

    A user's mistake, or a file that cannot be read or written, is reported as one line on standard error, with exit
    status 2.
    """
    try:
        app()
    except (MoEJaxError, OSError) as error:
        typer.echo(f"moe-jax: {error}", err=True)
        sys.exit(2)
