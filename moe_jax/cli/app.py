"""The `moe-jax` application: its commands, its devices and its error messages."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import jax
import typer

from moe_jax.cli.bench import bench
from moe_jax.cli.convert import convert
from moe_jax.cli.eval import score
from moe_jax.cli.generate import generate
from moe_jax.cli.plan import plan
from moe_jax.cli.processes import use_compilation_cache
from moe_jax.cli.train import train
from moe_jax.errors import MoEJaxError

COMMANDS = {"generate": generate, "eval": score, "train": train, "convert": convert, "plan": plan, "bench": bench}
"""Commands by name, in the order of `moe-jax --help`."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def configure(
    cpu_devices: Annotated[
        int, typer.Option(help="Number of virtual CPU devices on a machine without accelerators.", min=1)
    ] = 8,
) -> None:
    """Decode Mixture-of-Experts language models in batches on a JAX mesh."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA otherwise reports its progress on standard error
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    use_compilation_cache(Path.home() / ".cache" / "moe_jax")


for name, command in COMMANDS.items():
    app.command(name)(command)


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
