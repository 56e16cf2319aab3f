"""The command `moe-jax eval`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import EngineOptions, ModelOptions
from moe_jax.cli.output import Json, print_json
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError


@option_groups
def evaluate(
    *,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 file whose perplexity to measure.", show_default="none")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="File of examples, one JSON object a line, with a prompt and its answer, to match exactly.",
            show_default="none",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window of the text.", show_default="the maximum length")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next.", show_default="half a window")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.", min=1)] = 32,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.", show_default="none")
    ] = None,
    model: ModelOptions,
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a text, or the exact matches of greedy answers."""
    if (text is None) == (answers is None):
        raise RequestError("give --text FILE for perplexity, or --answers FILE for exact matches")
    if text is not None:
        result, words = _perplexity(text, (window, stride), model, engine)
    else:
        assert answers is not None
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
        result, words = _exact_match(answers, params, model, engine)
    print_json(result) if as_json else typer.echo(words)


def _perplexity(
    path: Path, windows: tuple[int | None, int | None], model: ModelOptions, engine: EngineOptions
) -> tuple[dict[str, Any], str]:
    """Return the measures as data and in words."""
    from moe_jax.llm.evaluation import perplexity
    from moe_jax.llm.text_files import read_text

    text, (length, stride) = read_text(path), windows
    llm = model.load(**asdict(engine))
    found = perplexity(llm, text, length=length, stride=stride, progress=sys.stderr.isatty())
    words = (
        f"perplexity {found.perplexity:,.4f}, {found.bits_per_byte:.4f} bits per byte, "
        f"on {found.tokens:,} tokens of {found.bytes:,} bytes"
    )
    return {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte, **asdict(found)}, words


def _exact_match(
    path: Path, params: SamplingParams, model: ModelOptions, engine: EngineOptions
) -> tuple[dict[str, Any], str]:
    """Return the measures as data and in words."""
    from moe_jax.llm.evaluation import answer, exact_match, read_examples

    examples = read_examples(path)
    answers = answer(model.load(**asdict(engine)), examples, params, progress=sys.stderr.isatty())
    share, count = exact_match(examples, answers), len(examples)
    return {"exact_match": share, "examples": count}, f"exact match {share:.2%}, {round(share * count):,} of {count:,}"
