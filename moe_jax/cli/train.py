"""The command `moe-jax train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_jax.cli.options import Mesh
from moe_jax.cli.output import Json, print_json


def train(
    output: Annotated[Path, typer.Argument(help="New directory for the model.")],
    mesh: Mesh = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps.", min=2, show_default="that of the bundled model")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Number of additions in each step.", min=1, show_default="that of the bundled model"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and the additions.", min=0, max=2**32 - 1)] = 0,
    as_json: Json = False,
) -> None:
    """Train the bundled model's recipe. A repeated run resumes from the last saved state."""
    from moe_jax.sharding import Route, ScatterCombine, as_placement
    from moe_jax.training import recipe

    placement = as_placement(mesh)
    route = Route.whole(ScatterCombine(placement))
    given = {name: value for name, value in (("steps", steps), ("batch_size", batch_size)) if value is not None}
    chosen = recipe.Recipe(seed=seed, **given)
    state = recipe.train(chosen, output, placement, route, progress=sys.stderr.isatty())
    result = {"model": str(output), "steps": int(state.step)}
    print_json(result) if as_json else typer.echo(f"trained {result['steps']} steps, written to {output}")
