"""The command `moe-jax train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_jax.cli.options import Mesh
from moe_jax.cli.output import Json, print_json
from moe_jax.sharding import Route, ScatterCombine, as_placement
from moe_jax.training import recipe
from moe_jax.training.recipe import Recipe


def train(
    output: Annotated[Path, typer.Argument(help="New directory for the model.")],
    mesh: Mesh = None,
    steps: Annotated[int, typer.Option(help="Number of training steps.", min=2)] = Recipe.steps,
    batch_size: Annotated[int, typer.Option(help="Number of additions in each step.", min=1)] = Recipe.batch_size,
    seed: Annotated[
        int, typer.Option(help="Seed of the initial weights and the additions.", min=0, max=2**32 - 1)
    ] = Recipe.seed,
    as_json: Json = False,
) -> None:
    """Train the bundled model's recipe. A repeated run resumes from the last saved state."""
    placement = as_placement(mesh)
    route = Route.whole(ScatterCombine(placement))
    chosen = Recipe(steps=steps, batch_size=batch_size, seed=seed)
    state = recipe.train(chosen, output, placement, route, progress=sys.stderr.isatty())
    result = {"model": str(output), "steps": int(state.step)}
    print_json(result) if as_json else typer.echo(f"trained {result['steps']} steps, written to {output}")
