"""Options of the command line: their help, their choices, and the dataclasses that hold them."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

import moe_jax.cli
from moe_jax.cli.app import COMMANDS, app
from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import EngineOptions, ModelOptions, RouteOptions
from moe_jax.cli.output import Json
from moe_jax.cli.sampling import SamplingOptions
from moe_jax.config import WeightDtype
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.llm.llm import LLM
from moe_jax.sharding.encoding import ENCODINGS
from moe_jax.sharding.policy import STRATEGIES
from moe_jax.sharding.residual import RESIDUALS

CHOICES = {
    "combine": ["auto", *STRATEGIES],
    "residual": ["auto", *RESIDUALS],
    "gather_dtype": list(ENCODINGS),
    "weight_dtype": list(WeightDtype),
}
"""Choices of each option that takes one of several names."""
QUANTIZED = {"gather_dtype", "weight_dtype"}
OPTIONS_OF = {"generate": set(CHOICES), "plan": set(CHOICES), "eval": QUANTIZED, "selftest": QUANTIZED}
"""Options of each command that take one of several names."""
SOURCES = sorted(Path(moe_jax.cli.__file__).parent.glob("*.py"))


def help_of(*command: str) -> str:
    return CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "300"}).output


def parameters() -> list[tuple[str, Any]]:
    group: Any = typer.main.get_command(app)
    commands = {"moe-jax": group, **group.commands}
    return [(f"{name} {each.name}", each) for name, command in commands.items() for each in command.params]


@pytest.mark.parametrize(("name", "parameter"), parameters(), ids=[name for name, _ in parameters()])
def test_every_option_has_a_help_text_that_is_a_sentence(name: str, parameter: Any) -> None:
    assert parameter.help, name
    assert parameter.help[0].isupper()
    assert parameter.help.endswith(".")


@pytest.mark.parametrize(("name", "parameter"), parameters(), ids=[name for name, _ in parameters()])
def test_every_option_shows_its_default(name: str, parameter: Any) -> None:
    """Required options have none, and a flag without an opposite is off."""
    is_flag = parameter.default is False and not parameter.secondary_opts
    assert parameter.required or is_flag or parameter.default is not None or isinstance(parameter.show_default, str)
    shown = help_of(*name.split()[:1]) if not name.startswith("moe-jax ") else help_of()
    text = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if not parameter.required and not is_flag and not isinstance(text, bool):
        assert f"[default: {text}]" in shown or f"[default: ({text})]" in shown


def test_every_argument_of_an_llm_is_an_option() -> None:
    options = {parameter.name for name, parameter in parameters() if name.startswith("generate ")}
    assert signature(LLM).parameters.keys() - options == {"checkpoint", "process_group"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_choices_that_the_library_has(command: str) -> None:
    shown = help_of(command)
    wanted = OPTIONS_OF.get(command, set())
    for option, names in CHOICES.items():
        assert (f"--{option.replace('_', '-')}" in shown) == (option in wanted)
        assert option not in wanted or "|".join(names) in shown


def test_help_of_the_application_lists_the_commands_in_order() -> None:
    shown = help_of()
    places = [shown.index(f" {command} ") for command in COMMANDS]
    assert places == sorted(places)


def test_defaults_are_those_of_the_library() -> None:
    arguments = signature(LLM).parameters
    for group in (ModelOptions(), RouteOptions(), EngineOptions()):
        for name, value in vars(group).items():
            assert value == (None if name == "model" else arguments[name].default)
    assert SamplingOptions().params() == SamplingParams()


@dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="Width.")]
    height: Annotated[int, typer.Option(help="Height.")] = 2


@dataclass(frozen=True)
class Door:
    height: Annotated[int, typer.Option(help="Height.")] = 3


def test_a_command_receives_finished_dataclasses() -> None:
    received = []
    application = typer.Typer()

    @application.command()
    @option_groups
    def measure(*, size: Size, as_json: Json = False) -> None:
        received.append((size, as_json))

    run = CliRunner().invoke
    assert run(application, ["--width", "5", "--json"]).exit_code == 0
    assert run(application, ["--width", "5", "--height", "7"]).exit_code == 0
    assert run(application, ["--height", "7"]).exit_code == 2
    assert received == [(Size(5, 2), True), (Size(5, 7), False)]


def test_two_dataclasses_with_the_same_field_are_refused() -> None:
    def measure(*, size: Size, door: Door) -> None: ...

    with pytest.raises(ValueError, match="duplicate parameter name: 'height'"):
        option_groups(measure)


@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_functions_are_short_and_have_few_parameters(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef):
            taken = node.args
            assert len(taken.posonlyargs + taken.args + taken.kwonlyargs) <= 12, node.name
            start = min([node.lineno, *(each.lineno for each in node.decorator_list)])
            assert (node.end_lineno or 0) - start < 40, node.name


@pytest.mark.parametrize("module", ["moe_jax", "moe_jax.cli"])
def test_runs_as_a_module(module: str) -> None:
    shown = subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True, text=True).stdout
    assert f"python -m {module}" in shown
    assert all(command in shown for command in COMMANDS)
