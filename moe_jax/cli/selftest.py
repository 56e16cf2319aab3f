"""The command `moe-jax selftest`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import CombineName, ModelOptions
from moe_jax.cli.output import Json, print_json

COMBINES = (CombineName("scatter"), CombineName("reduce"))


@option_groups
def selftest(
    *,
    model: ModelOptions,
    problems: Annotated[int, typer.Option(help="Number of held-out additions.", min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Check that the scatter and reduce combines give the same answers, on additions that the bundled model solves."""
    from moe_jax.training.evaluation import evaluate, held_out

    questions = held_out(problems)
    results = {
        name.value: evaluate(model.load(combine=name), questions, progress=sys.stderr.isatty()) for name in COMBINES
    }
    scatter, reduce = (result.answers for result in results.values())
    scores = {name: result.exact_match for name, result in results.items()}
    if as_json:
        print_json({"problems": problems, "exact_match": scores, "same_answers": scatter == reduce})
    else:
        for name, exact_match in scores.items():
            typer.echo(f"{name:8} exact match {exact_match:.2%} on {problems} held-out additions")
    if scatter != reduce:
        typer.echo("the two combines gave different answers", err=True)
        raise typer.Exit(1)
