"""Shared parts of the scripts: arguments, devices, table, JSON line and plot."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import flax
import jax

from moe_jax.errors import MoEJaxError
from moe_jax.sharding import Placement, as_placement

Axes: TypeAlias = Any
"""`matplotlib.axes.Axes`; matplotlib is optional."""


def parser(name: str, description: str, *, repeats: int) -> ArgumentParser:
    """Make a parser with the arguments of all scripts; `repeats` is a default."""
    parser = ArgumentParser(f"python -m bench.{name}", None, description, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--mesh", help="for example 'data=2,expert=4', roles after semicolons; by default expert=<all devices>"
    )
    parser.add_argument("--cpu-devices", type=positive, default=8, help="virtual devices if there is no accelerator")
    parser.add_argument("--repeats", type=positive, default=repeats, help="timed calls of each variant")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that the script runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON line to a file too")
    parser.add_argument("--plot", type=Path, metavar="FILE", default=f"bench_{name}.png", help="PNG file of the plot")
    return parser


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def above_one(text: str) -> int:
    """Parse a whole number above 1."""
    if positive(text) < 2:
        raise ArgumentTypeError(f"expected a whole number above 1, got {text!r}")
    return int(text)


def above_zero(text: str) -> float:
    """Parse a number above 0, infinity included."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def several(one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Parser of values separated by commas, from the parser of one."""
    return lambda text: [one(part) for part in text.split(",")]


def begin(parser: ArgumentParser, quick: Mapping[str, Any]) -> tuple[Namespace, Placement]:
    """Parse the command line, with the defaults `quick` under --quick; set up the devices and print the machine."""
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args()
    for path in filter(None, (options.json, options.plot)):
        if not path.absolute().parent.is_dir():
            parser.error(f"cannot write {path}: there is no directory {path.parent}")
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    placement = as_placement(options.mesh)
    print(", ".join(f"{name} {value}" for name, value in machine(placement).items()))
    if placement.mesh.devices.size == 1:
        print("one device: no data moves between devices, so the variants differ in local copies only")
    return options, placement


def machine(placement: Placement) -> dict[str, Any]:
    """Description of the machine and its software."""
    device, devices = placement.mesh.devices.flat[0], placement.mesh.devices.size
    virtual = " (virtual)" if device.platform == "cpu" and devices > 1 else ""
    return {
        "devices": f"{devices} x {device.device_kind}{virtual}",
        "host": f"{platform.machine()} with {os.cpu_count()} cores",
        "jax": jax.__version__,
        "flax": flax.__version__,
        "placement": str(placement),
    }


class Table:
    """Table that prints each row at once. `columns` maps each heading to a format such as `>8`."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._formats = tuple(columns.values())
        self.row(*columns)

    def row(self, *cells: Any) -> None:
        print(" ".join(f"{cell!s:{form}}" for cell, form in zip(cells, self._formats, strict=True)), flush=True)


def finish(
    name: str, options: Namespace, placement: Placement, results: Mapping[str, Any], draw: Callable[[Axes], None]
) -> None:
    """Print the JSON line as the last line of standard output, and draw the plot."""
    line = json.dumps({"bench": name, "quick": options.quick, **machine(placement), **results})
    print(line, flush=True)
    if options.json:
        options.json.write_text(line + "\n")
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("plot not drawn: matplotlib is not installed; run pip install '.[bench]'", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    setup = machine(placement)
    axes.set_title(f"bench.{name}: {setup['devices']}, jax {setup['jax']}, {options.repeats} repeats", fontsize=10)
    axes.legend()
    figure.savefig(options.plot, format="png", dpi=120)
    print(f"plot written to {options.plot}", file=sys.stderr)


def bars(axes: Axes, labels: Sequence[str], variants: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw milliseconds with their spread: a group of bars for each label, a bar for each variant."""
    width = 0.8 / len(variants)
    for index, (name, times) in enumerate(variants.items()):
        at = [label + (index - (len(variants) - 1) / 2) * width for label in range(len(labels))]
        errors = [time["ms"] * time["spread"] for time in times]
        axes.bar(at, [time["ms"] for time in times], width, yerr=errors, capsize=3, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("ms")


def run(main: Callable[[], None]) -> None:
    """Run a script; report users' mistakes and file errors as one line on standard error, with exit status 2."""
    try:
        main()
    except (MoEJaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
