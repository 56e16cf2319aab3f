"""The command `moe-jax plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import jax
import typer

from moe_jax.analysis.explain import explain
from moe_jax.analysis.targets import CHIPS, COMPILER_OPTIONS, target_placement
from moe_jax.checkpoints import Checkpoint
from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import EngineOptions, ModelOptions, RouteOptions
from moe_jax.cli.output import Json, print_json
from moe_jax.engine import Options, plan_cache
from moe_jax.errors import CapacityError, RequestError
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs
from moe_jax.sharding import Role, as_hardware, as_placement, free_memory


@option_groups
def plan(
    *,
    model: ModelOptions,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"GPUs to compile for, which need not be present: {', '.join(CHIPS)}.", show_default="the devices"
        ),
    ] = None,
    route: RouteOptions,
    rows: Annotated[int, typer.Option(help="Number of sequences on every token shard.", min=1)] = 8,
    counts: Annotated[
        str | None,
        typer.Option(help="Number of sequences on each token shard, as in '5,9,0,3'.", show_default="as --rows"),
    ] = None,
    engine: EngineOptions,
    as_json: Json = False,
) -> None:
    """Explain one decode step on a mesh. It needs config.json but no weights, and with --target no GPU."""
    checkpoint = Checkpoint(model.model)
    if target is None:
        placement, compiler_options = as_placement(model.mesh), None
    else:
        jax.config.update("jax_platforms", "cpu")
        placement, compiler_options = target_placement(target, model.mesh), COMPILER_OPTIONS
    quantization = checkpoint.quantization(model.weight_dtype)
    dtype = model.dtype or checkpoint.dtype
    decoder = ShardedDecoder(checkpoint.config, placement, dtype, route.scan_layers, quantization)
    hardware = as_hardware(route.hardware or target)
    policy = decoder.policy(hardware, route.combine, route.residual, model.gather_dtype)
    shards = placement.size(Role.TOKENS)
    sequences = [rows] * shards if counts is None else _whole_numbers(counts, shards)
    is_there = target is None and route.hardware is None
    free = free_memory(placement) if is_there else hardware.memory / hardware.sharers(placement)
    length, held, error = _plan_cache(engine, decoder, free)
    explanation = explain(Programs(decoder, compiler_options), policy, sequences, length, free, held)
    if as_json:
        print_json({**explanation.as_dict(), "engine_error": error})
    else:
        typer.echo(f"{explanation}\nengine       cannot start: {error}" if error else explanation)


def _plan_cache(engine: EngineOptions, decoder: ShardedDecoder, free: float) -> tuple[int, int | None, str | None]:
    """Return the maximum length and the bytes of the cache on each device, or the reason that no cache fits."""
    try:
        cache = plan_cache(Options(**asdict(engine)), decoder, free)
    except CapacityError as error:
        return engine.max_length or decoder.config.max_positions, None, str(error)
    return cache.max_length, cache.bytes_per_device, None


def _whole_numbers(text: str, length: int) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != length or len(numbers) != text.count(",") + 1 or not any(numbers):
        raise RequestError(f"--counts needs a number for each of {length} token shards, not all 0, got {text!r}")
    return numbers
