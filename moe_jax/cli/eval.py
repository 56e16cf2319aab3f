"""The command `moe-jax eval`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import EngineOptions, ModelOptions
from moe_jax.cli.output import Json, print_json
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError

if TYPE_CHECKING:
    from moe_jax.llm.llm import LLM


@option_groups
def evaluate(
    *,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file whose perplexity to measure.")] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="File of examples, one JSON object a line, with a prompt and its answer, to match exactly."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window of the text.", show_default="the maximum length")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="half a window")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.", min=1)] = 32,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    model: ModelOptions,
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a text, or the exact matches of greedy answers."""
    if (text is None) == (answers is None):
        raise RequestError("give --text FILE for perplexity, or --answers FILE for exact matches")
    if text is not None:
        result = _perplexity(text, window, stride, model.load(**asdict(engine)))
    else:
        assert answers is not None
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
        result = _exact_match(answers, params, model, engine)
    if as_json:
        print_json(result)
    else:
        typer.echo(", ".join(f"{name.replace('_', ' ')} {_format(value)}" for name, value in result.items()))


def _perplexity(path: Path, window: int | None, stride: int | None, llm: LLM) -> dict[str, Any]:
    from moe_jax.llm.evaluation import perplexity

    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not in UTF-8 ({error}): convert it") from error
    found = perplexity(llm, text, length=window, stride=stride, progress=sys.stderr.isatty())
    return {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte, **asdict(found)}


def _exact_match(path: Path, params: SamplingParams, model: ModelOptions, engine: EngineOptions) -> dict[str, Any]:
    from moe_jax.llm.evaluation import answer, exact_match, read_examples

    examples = read_examples(path)
    answers = answer(model.load(**asdict(engine)), examples, params, progress=sys.stderr.isatty())
    return {"exact_match": exact_match(examples, answers), "examples": len(examples)}


def _format(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
