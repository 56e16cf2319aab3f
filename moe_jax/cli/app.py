"""The `moe-jax` application: its commands, its devices, its log and its error messages.

JAX is imported when a command runs: help, version and wrong options answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from tqdm import tqdm

import moe_jax
from moe_jax.cli.bench import bench
from moe_jax.cli.convert import convert
from moe_jax.cli.eval import evaluate
from moe_jax.cli.generate import generate
from moe_jax.cli.option_groups import option_groups, with_group
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

LOGGER = logging.getLogger("moe_jax")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True)
class LogOptions:
    """The amount of the log on standard error."""

    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log details to standard error, and where an error arose.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors alone.")] = False

    @property
    def level(self) -> int:
        return logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO

    def __or__(self, other: LogOptions) -> LogOptions:
        return LogOptions(self.verbose or other.verbose, self.quiet or other.quiet)


@dataclass(frozen=True)
class Setup:
    """Devices and log of the program."""

    cpu_devices: int
    log: LogOptions

    def apply(self) -> None:
        """Set up the devices, the compilation cache and the log."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA otherwise reports its progress on standard error
        import jax

        from moe_jax.cli.processes import DEFAULT_CACHE, use_compilation_cache

        jax.config.update("jax_num_cpu_devices", self.cpu_devices)
        use_compilation_cache(DEFAULT_CACHE)
        LOGGER.handlers[:] = [LogLines()]
        LOGGER.setLevel(self.log.level)


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
@option_groups
def configure(
    *,
    cpu_devices: Annotated[
        int, typer.Option(help="Number of virtual CPU devices on a machine without accelerators.", min=1)
    ] = 8,
    log: LogOptions,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Decode Mixture-of-Experts language models in batches on a JAX mesh."""
    SETUP.set(Setup(cpu_devices, log))


def _set_up(log: LogOptions) -> None:
    setup = SETUP.get()
    replace(setup, log=setup.log | log).apply()


for name, command in COMMANDS.items():
    app.command(name)(with_group(command, LogOptions, _set_up))


def main() -> None:
    """Run the command line.

    A user's mistake, or a file that cannot be read or written, is reported as one line on standard error, with exit
    status 1. Wrong options have status 2, and an interrupt has 130.
    """
    try:
        app()
    except (MoEJaxError, OSError) as error:
        LOGGER.debug("where the error arose:", exc_info=True)
        typer.echo(f"moe-jax: {_describe(error)}", err=True)
        sys.exit(1)


def _describe(error: Exception) -> str:
    """Describe an error as `No such file or directory: 'in.jsonl'` if it is of the operating system."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {str(error.filename)!r}"
    return str(error)
