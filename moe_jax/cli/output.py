"""JSON output of the commands."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object on one line of standard output."""
    typer.echo(json.dumps(content))
