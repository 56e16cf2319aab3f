"""The command `moe-jax plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moe_jax.cli.option_groups import option_groups
from moe_jax.cli.options import EngineOptions, ModelOptions, RouteOptions
from moe_jax.cli.output import Json, print_json
from moe_jax.config.choices import TARGETS
from moe_jax.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from moe_jax.analysis.explain import Explanation
    from moe_jax.models import ShardedDecoder


@option_groups
def plan(
    *,
    model: ModelOptions,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"GPUs to compile for, which need not be present: {', '.join(TARGETS)}.", show_default="the devices"
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
    explanation, error = _explain(model, target, route, (rows, counts), engine)
    if as_json:
        print_json({**explanation.as_dict(), "engine_error": error})
    else:
        typer.echo(f"{explanation}\nengine       cannot start: {error}" if error else explanation)


def _explain(
    model: ModelOptions,
    target: str | None,
    route: RouteOptions,
    sequences: tuple[int, str | None],
    engine: EngineOptions,
) -> tuple[Explanation, str | None]:
    """Return the explanation, and the reason that the engine could not start."""
    import jax

    from moe_jax.analysis.explain import explain
    from moe_jax.analysis.targets import COMPILER_OPTIONS, target_placement
    from moe_jax.checkpoints import Checkpoint
    from moe_jax.checkpoints.bundled import ADDER
    from moe_jax.models import ShardedDecoder
    from moe_jax.programs import Programs
    from moe_jax.sharding import Role, as_hardware, free_memory, placement_for

    checkpoint = Checkpoint(model.model or ADDER)
    if target is None:
        placement, compiler_options = placement_for(checkpoint.config, model.mesh), None
    else:
        jax.config.update("jax_platforms", "cpu")
        placement, compiler_options = target_placement(target, model.mesh), COMPILER_OPTIONS
    quantization = checkpoint.quantization(model.weight_dtype)
    dtype = model.dtype or checkpoint.dtype
    decoder = ShardedDecoder(checkpoint.config, placement, dtype, route.scan_layers, quantization)
    hardware = as_hardware(route.hardware or target)
    policy = decoder.policy(hardware, route.combine, route.residual, model.gather_dtype)
    shards = placement.size(Role.TOKENS)
    rows, text = sequences
    counts = [rows] * shards if text is None else _whole_numbers(text, shards)
    is_there = target is None and route.hardware is None
    free = free_memory(placement) if is_there else hardware.memory / hardware.sharers(placement)
    length, held, error = _plan_cache(engine, decoder, free)
    return explain(Programs(decoder, compiler_options), policy, counts, length, free, held), error


def _plan_cache(engine: EngineOptions, decoder: ShardedDecoder, free: float) -> tuple[int, int | None, str | None]:
    """Return the maximum length and the bytes of the cache on each device, or the reason that no cache fits."""
    from moe_jax.engine import plan_cache

    try:
        cache = plan_cache(engine.options(), decoder, free)
    except CapacityError as error:
        return engine.max_length or decoder.config.max_positions, None, str(error)
    return cache.max_length, cache.bytes_per_device, None


def _whole_numbers(text: str, length: int) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != length or len(numbers) != text.count(",") + 1 or not any(numbers):
        raise RequestError(f"--counts needs a number for each of {length} token shards, not all 0, got {text!r}")
    return numbers
