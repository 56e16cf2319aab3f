"""The command `moe-jax`. Where there is no accelerator it runs on virtual CPU devices, by the same code path."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from tqdm import tqdm

from moe_jax.analysis.calibration import measure
from moe_jax.analysis.explain import explain
from moe_jax.analysis.targets import CHIPS, COMPILER_OPTIONS, target_placement
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.checkpoints.checkpoint import check_new
from moe_jax.config import WeightDtype
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine.distributed import ProcessGroup, SingleProcess, join
from moe_jax.errors import ConfigError, MoEJaxError, RequestError
from moe_jax.llm.batch_files import check_paths, generate_file
from moe_jax.llm.llm import LLM, resolve_max_length
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import Role, Route, ScatterCombine, as_hardware, as_placement
from moe_jax.sharding.hardware import save
from moe_jax.training.evaluation import evaluate, held_out
from moe_jax.training.recipe import Recipe
from moe_jax.training.recipe import train as run_worker

BUILT_IN_PROMPTS = ["1+1=", "12+34=", "99+1=", "123+456=", "808+77=", "999+999=", "1234+5678=", "9999+1="]


class CombineName(StrEnum):
    AUTO = "auto"
    SCATTER = "scatter"
    REDUCE = "reduce"
    RAGGED = "ragged"
    ALL_TO_ALL = "all-to-all"


class ResidualName(StrEnum):
    AUTO = "auto"
    WHOLE = "whole"
    SPLIT = "split"


class GatherDtype(StrEnum):
    EXACT = "exact"
    FLOAT8 = "float8_e4m3fn"
    INT8 = "int8"


class Format(StrEnum):
    ORBAX = "orbax"
    HUGGING_FACE = "huggingface"


Model = Annotated[Path, typer.Option(help="Checkpoint directory.", show_default="the bundled model")]
Mesh = Annotated[
    str | None,
    typer.Option(
        help="As in 'data=2,expert=4'; roles after semicolons, as in 'data=2,expert=4; tokens=data; heads=expert'.",
        show_default="all devices on expert",
    ),
]
CombineOption = Annotated[CombineName, typer.Option(help="How feed-forward blocks combine.")]
ResidualOption = Annotated[
    ResidualName, typer.Option(help="What heads devices keep of their rows: split is sequence parallelism.")
]
GatherDtypeOption = Annotated[GatherDtype, typer.Option(help="How rows are sent to feed-forward blocks.")]
WeightDtypeOption = Annotated[
    WeightDtype, typer.Option(help="Of the matrices of attention and feed-forwards; exact is the dtype of computation.")
]
Dtype = Annotated[str | None, typer.Option(help="Of weights and computation.", show_default="as saved")]
ScanLayers = Annotated[
    bool, typer.Option(help="Compile layers that are alike once; steps copy less if each is compiled for itself.")
]
HardwareOption = Annotated[
    str | None,
    typer.Option(help="What the policy reckons with: a name such as h100, or a file.", show_default="the devices"),
]
Distributed = Annotated[
    bool,
    typer.Option("--distributed", help="One of several processes, as JAX detects them (SLURM, Open MPI, Kubernetes)."),
]
Coordinator = Annotated[
    str | None, typer.Option(help="One of several processes: HOST:PORT of the first.", show_default="none, or detected")
]
NumProcesses = Annotated[int | None, typer.Option(help="How many processes there are.", show_default="detected")]
ProcessId = Annotated[int | None, typer.Option(help="Which of them this is, from 0.", show_default="detected")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def devices(
    cpu_devices: Annotated[int, typer.Option(help="Virtual devices where there is no accelerator.", min=1)] = 8,
) -> None:
    """Decode Mixture-of-Experts language models in batches on a JAX mesh."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA otherwise reports its progress on standard error
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "moe_jax"))


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue.", show_default="a few sums")] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="File of prompts, a JSON object on each line: prompt, and any sampling parameter."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the results; run again after a kill, it goes on where it was.")
    ] = None,
    model: Model = ADDER,
    mesh: Mesh = None,
    combine: CombineOption = CombineName.AUTO,
    residual: ResidualOption = ResidualName.AUTO,
    gather_dtype: GatherDtypeOption = GatherDtype.EXACT,
    dtype: Dtype = None,
    weight_dtype: WeightDtypeOption = WeightDtype.EXACT,
    max_tokens: Annotated[int, typer.Option(help="The most tokens to generate for each.")] = 16,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all tokens.")] = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a continuation; may be repeated.")] = None,
    denoising_steps: Annotated[
        int | None, typer.Option(help="For a block, at most.", show_default="one for each of its tokens")
    ] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Likelier tokens of a block are chosen at once.", show_default="0.95")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Positions of a sequence.", show_default="the model's")] = None,
    max_batch_size: Annotated[int, typer.Option(help="Sequences that are decoded together.")] = 256,
    prefill_tokens: Annotated[int, typer.Option(help="Of prompts, in a step of a token shard, at most.")] = 512,
    decode_steps: Annotated[int, typer.Option(help="Run by the devices before the host looks at them.")] = 8,
    cache_pages: Annotated[
        int | None, typer.Option(help="Of 16 positions, on each token shard.", show_default="as memory allows")
    ] = None,
    hardware: HardwareOption = None,
    scan_layers: ScanLayers = True,
    distributed: Distributed = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    as_json: Json = False,
) -> None:
    """Continue prompts, and show how the mesh was used."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        denoising_steps=denoising_steps,
        confidence_threshold=confidence_threshold,
    )
    if (input is None) != (output is None) or (input and prompts):
        raise RequestError("--input and --output go together, in place of prompts")
    if not input and not prompts and model != ADDER:
        raise RequestError("give prompts to continue: the built-in ones are sums for the bundled model")
    with _process_group(distributed, coordinator, num_processes, process_id) as process_group:
        if input and output and process_group.is_driver:
            check_paths(input, output)
        llm = LLM(
            model,
            mesh=mesh,
            dtype=dtype,
            weight_dtype=weight_dtype.value,
            hardware=hardware,
            scan_layers=scan_layers,
            combine=combine.value,
            residual=residual.value,
            gather_dtype=gather_dtype.value,
            max_length=max_length,
            max_batch_size=max_batch_size,
            prefill_tokens=prefill_tokens,
            decode_steps=decode_steps,
            cache_pages=cache_pages,
            process_group=process_group,
        )
        if not process_group.is_driver:
            llm.run_worker()
        elif input and output:
            _generate_file(llm, input, output, params, as_json=as_json)
        else:
            _generate_texts(llm, prompts or BUILT_IN_PROMPTS, params, as_json=as_json)


def _generate_file(llm: LLM, source: Path, output: Path, params: SamplingParams, *, as_json: bool) -> None:
    with tqdm(desc="generating", unit=" lines", disable=not sys.stderr.isatty(), leave=False) as bar:

        def broadcast(done: int, wanted: int) -> None:
            bar.total, bar.n = wanted, done
            bar.set_postfix_str(str(llm.stats()))

        failed = generate_file(llm, source, output, params, broadcast)
    if failed:
        typer.echo(f"lines that could not be served: {failed}; each has its error in {output}", err=True)
    stats = llm.stats()
    if as_json:
        _print_json({"output": str(output), "failed": failed, **asdict(stats)})
    else:
        typer.echo(f"written to {output}: " + (str(stats) if stats.generated_tokens else "nothing generated"))


def _generate_texts(llm: LLM, asked: list[str], params: SamplingParams, *, as_json: bool) -> None:
    outputs = llm.generate(asked, params, progress=sys.stderr.isatty())
    explanation, stats = llm.explain(min(len(asked), llm.max_batch_size)), llm.stats()
    if as_json:
        texts = [
            {
                "prompt": prompt,
                "text": o.text,
                "token_ids": o.token_ids,
                "finish_reason": o.finish_reason,
                "error": o.error,
            }
            for prompt, o in zip(asked, outputs, strict=True)
        ]
        _print_json({"outputs": texts, "tokens_per_second": stats.tokens_per_second, **explanation.as_dict()})
        return
    for prompt, output in zip(asked, outputs, strict=True):
        typer.echo(f"{prompt}{output.text if output.text is not None else output.token_ids}")
        if output.error:
            typer.echo(f"    failed: {output.error}", err=True)
    typer.echo(f"\n{explanation}\nspeed        " + (str(stats) if stats.generated_tokens else "nothing generated"))


@contextmanager
def _process_group(
    distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[ProcessGroup]:
    if not distributed and coordinator is num_processes is process_id is None:
        yield SingleProcess()
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # compilers that work together all compile, or all find it done
        jax.config.update("jax_compilation_cache_dir", None)
    with _results_apart(), join(coordinator, num_processes, process_id) as process_group:
        yield process_group


@contextmanager
def _results_apart() -> Iterator[None]:
    """What libraries print goes to standard error, which is where Gloo's greetings belong; what this program prints
    stays on standard output."""
    sys.stdout.flush()
    out, results = os.dup(1), sys.stdout
    with open(out, "w", encoding=results.encoding) as sys.stdout:  # noqa: PTH123
        os.dup2(2, 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(out, 1)
            sys.stdout = results


@app.command(name="eval")
def evaluate_both(
    model: Model = ADDER,
    mesh: Mesh = None,
    gather_dtype: GatherDtypeOption = GatherDtype.EXACT,
    dtype: Dtype = None,
    weight_dtype: WeightDtypeOption = WeightDtype.EXACT,
    problems: Annotated[int, typer.Option(help="How many held-out additions.", min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Exact match on held-out additions with both combines, which must agree."""
    asked = held_out(problems)
    results = {}
    for name in (CombineName.SCATTER, CombineName.REDUCE):
        llm = LLM(
            model,
            mesh=mesh,
            dtype=dtype,
            weight_dtype=weight_dtype.value,
            combine=name.value,
            gather_dtype=gather_dtype.value,
        )
        results[name.value] = evaluate(llm, asked, progress=sys.stderr.isatty())
    check_agreement = results["scatter"].answers == results["reduce"].answers
    scores = {name: result.exact_match for name, result in results.items()}
    if as_json:
        _print_json({"problems": problems, "exact_match": scores, "same_answers": check_agreement})
    else:
        for name, score in scores.items():
            typer.echo(f"{name:8} exact match {score:.2%} on {problems} held-out additions")
    if not check_agreement:
        typer.echo("the two combines gave different answers", err=True)
        raise typer.Exit(1)


@app.command()
def train(
    output: Annotated[Path, typer.Argument(help="New directory for the model.")],
    mesh: Mesh = None,
    steps: Annotated[int, typer.Option(min=2)] = Recipe.steps,
    batch_size: Annotated[int, typer.Option(min=1)] = Recipe.batch_size,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = Recipe.seed,
    as_json: Json = False,
) -> None:
    """Train the bundled model's recipe. Run again after a kill, it goes on from the state that it last saved."""
    placement = as_placement(mesh)
    recipe = Recipe(steps=steps, batch_size=batch_size, seed=seed)
    state = run_worker(recipe, output, placement, Route.whole(ScatterCombine(placement)), progress=sys.stderr.isatty())
    result = {"model": str(output), "steps": int(state.step)}
    _print_json(result) if as_json else typer.echo(f"trained {result['steps']} steps, written to {output}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint directory of either format.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    to: Annotated[Format, typer.Option(help="The format to write.")],
    mesh: Mesh = None,
) -> None:
    """Rewrite a checkpoint in another format, in the dtype that its config.json names."""
    checkpoint = Checkpoint(source)
    check_new(output)
    decoder = ShardedDecoder(checkpoint.config, as_placement(mesh), checkpoint.dtype)
    parameters = checkpoint.load(decoder)
    if to is Format.ORBAX:
        checkpoint.save_orbax(output, parameters)
    else:
        checkpoint.save_hugging_face(output, decoder, parameters)
    typer.echo(f"written to {output}")


@app.command()
def plan(
    model: Model = ADDER,
    target: Annotated[
        str | None,
        typer.Option(help=f"GPUs to compile for, none needed: {', '.join(CHIPS)}.", show_default="the devices"),
    ] = None,
    mesh: Mesh = None,
    combine: CombineOption = CombineName.AUTO,
    residual: ResidualOption = ResidualName.AUTO,
    gather_dtype: GatherDtypeOption = GatherDtype.EXACT,
    dtype: Dtype = None,
    weight_dtype: WeightDtypeOption = WeightDtype.EXACT,
    rows: Annotated[int, typer.Option(help="Sequences on each token shard.", min=1)] = 8,
    counts: Annotated[
        str | None, typer.Option(help="Sequences on each token shard, as in '5,9,0,3'.", show_default="as --rows")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Cache positions.", show_default="the model's")] = None,
    hardware: HardwareOption = None,
    scan_layers: ScanLayers = True,
    as_json: Json = False,
) -> None:
    """What one decode step would do on a mesh; needs config.json, no weights, and with --target no GPU."""
    checkpoint = Checkpoint(model)
    if target is None:
        placement, options = as_placement(mesh), None
    else:
        jax.config.update("jax_platforms", "cpu")
        placement, options = target_placement(target, mesh), COMPILER_OPTIONS
    quantization = checkpoint.quantization(weight_dtype.value)
    decoder = ShardedDecoder(checkpoint.config, placement, dtype or checkpoint.dtype, scan_layers, quantization)
    length = resolve_max_length(checkpoint.config, max_length)
    policy = decoder.policy(as_hardware(hardware or target), combine.value, residual.value, gather_dtype.value)
    shards = placement.size(Role.TOKENS)
    asked = [rows] * shards if counts is None else _whole_numbers(counts, shards)
    explanation = explain(Programs(decoder, options), policy, asked, length)
    _print_json(explanation.as_dict()) if as_json else typer.echo(explanation)


@app.command()
def bench(
    mesh: Mesh = None,
    repeats: Annotated[int, typer.Option(min=1)] = 30,
    calibrate: Annotated[Path | None, typer.Option(help="File for a record that --hardware takes.")] = None,
    hardware: HardwareOption = None,
    as_json: Json = False,
) -> None:
    """Time collectives on these devices, beside what the policy reckons."""
    if calibrate is not None and not calibrate.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {calibrate}: there is no directory {calibrate.parent}")
    placement = as_placement(mesh)
    measured = measure(placement, repeats)
    record = as_hardware(hardware)
    if calibrate is not None:
        record = measured.fit()
        save(record, calibrate)
    rows = [
        {
            "collective": sample.move.kind.value,
            "rows": sample.move.rows,
            "sent_bytes": sample.move.sent_bytes,
            "seconds": sample.seconds,
            "reckoned_seconds": record.seconds([sample.move], placement),
        }
        for sample in measured.samples
    ]
    if as_json:
        _print_json({"hardware": asdict(record), "collectives": rows})
        return
    for row in rows:
        micro = f"{row['seconds'] * 1e6:10.0f} us measured {row['reckoned_seconds'] * 1e6:10.0f} us reckoned"
        typer.echo(f"{row['collective']:15} {row['rows']:5} rows {row['sent_bytes'] / 1024:9.0f} KiB sent {micro}")
    speeds = f"{record.local.bandwidth / 1e9:.2f} GB/s sent, {record.memory_bandwidth / 1e9:.2f} GB/s in memory"
    typer.echo(f"launch {record.launch * 1e6:.0f} us, {speeds} ({record.source})")


def _whole_numbers(text: str, wanted: int) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != wanted or len(numbers) != text.count(",") + 1 or not any(numbers):
        raise RequestError(f"--counts needs a number for each of {wanted} token shards, not all 0, got {text!r}")
    return numbers


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content))


def main() -> None:
    """Run the command line; users' mistakes, and files that cannot be read or written, are one line on standard error
    and exit status 2."""
    try:
        app()
    except (MoEJaxError, OSError) as error:
        typer.echo(f"moe-jax: {error}", err=True)
        sys.exit(2)
