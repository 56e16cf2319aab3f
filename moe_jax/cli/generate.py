"""The command `moe-jax generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import EngineOptions, ModelOptions, RouteOptions
from moe_jax.cli.output import Json, print_json
from moe_jax.cli.processes import ProcessOptions
from moe_jax.cli.sampling import SamplingOptions
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError

if TYPE_CHECKING:
    from moe_jax.engine.outputs import RequestOutput
    from moe_jax.llm.llm import LLM

BUILT_IN_PROMPTS = ["1+1=", "12+34=", "99+1=", "123+456=", "808+77=", "999+999=", "1234+5678=", "9999+1="]


@dataclass(frozen=True)
class FileOptions:
    """A file of prompts, and the file for its results."""

    input: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts, one JSON object a line: a prompt, and any sampling parameters.", show_default="none"
        ),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            help="File for the results of a file of prompts; a repeated run resumes after the last result.",
            show_default="none",
        ),
    ] = None


@option_groups
def generate(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.", show_default="a few sums")] = None,
    files: FileOptions,
    model: ModelOptions,
    route: RouteOptions,
    sampling: SamplingOptions,
    engine: EngineOptions,
    processes: ProcessOptions,
    as_json: Json = False,
) -> None:
    """Continue prompts, and show how the mesh was used."""
    from moe_jax.llm.batch_files import check_paths

    params, input, output = sampling.params(), files.input, files.output
    if (input is None) != (output is None) or (input and prompts):
        raise RequestError("--input and --output go together, in place of prompts")
    if not input and not prompts and model.model is not None:
        raise RequestError("give prompts to continue: the built-in ones are sums for the bundled model")
    has_failed = False
    with processes.join() as process_group:
        if input and output and process_group.is_driver:
            check_paths(input, output)
        llm = model.load(**asdict(route), **asdict(engine), process_group=process_group)
        if not process_group.is_driver:
            llm.run_worker()
        elif input and output:
            has_failed = _generate_file(llm, input, output, params, as_json=as_json)
        else:
            has_failed = _generate_texts(llm, prompts or BUILT_IN_PROMPTS, params, as_json=as_json)
    if has_failed:
        raise typer.Exit(1)


def _generate_file(llm: LLM, source: Path, output: Path, params: SamplingParams, *, as_json: bool) -> bool:
    """Return True if a line failed."""
    from moe_jax.llm.batch_files import generate_file

    with tqdm(desc="generating", unit=" lines", disable=not sys.stderr.isatty(), leave=False) as bar:

        def show_progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_postfix_str(str(llm.stats()))

        lines, failed = generate_file(llm, source, output, params, show_progress)
    if as_json:
        print_json({"output": str(output), "lines": lines, "failed": failed, **asdict(llm.stats())})
    else:
        typer.echo(f"written to {output}: {_speed(llm)}")
    if failed:
        typer.echo(f"{failed} of {lines} lines failed: each has its error in {output}", err=True)
    return failed > 0


def _generate_texts(llm: LLM, prompts: list[str], params: SamplingParams, *, as_json: bool) -> bool:
    """Return True if a prompt failed."""
    outputs = llm.generate(prompts, params, progress=sys.stderr.isatty())
    explanation = llm.explain(min(len(prompts), llm.max_batch_size))
    if as_json:
        texts = [_as_dict(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
        speed = llm.stats().tokens_per_second
        print_json({"outputs": texts, "tokens_per_second": speed, **explanation.as_dict()})
    else:
        for prompt, output in zip(prompts, outputs, strict=True):
            typer.echo(f"{prompt}{output.text if output.text is not None else output.token_ids}")
            if output.error:
                typer.echo(f"    failed: {output.error}", err=True)
        typer.echo(f"\n{explanation}\nspeed        {_speed(llm)}")
    return any(output.error for output in outputs)


def _as_dict(prompt: str, output: RequestOutput) -> dict[str, object]:
    names = ("text", "token_ids", "finish_reason", "error")
    return {"prompt": prompt, **{name: getattr(output, name) for name in names}}


def _speed(llm: LLM) -> str:
    stats = llm.stats()
    return str(stats) if stats.generated_tokens else "nothing generated"
