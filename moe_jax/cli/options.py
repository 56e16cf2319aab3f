"""Options shared by several commands. Their defaults and choices belong to the library."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.config import WeightDtype
from moe_jax.config.choices import AUTO, COMBINES, GATHER_DTYPES, RESIDUAL_LAYOUTS
from moe_jax.config.engine_options import ACCELERATOR_SHARE, CPU_SHARE, MAX_N, PAGE, Options

if TYPE_CHECKING:
    from moe_jax.llm.llm import LLM

Mesh = Annotated[
    str | None,
    typer.Option(
        help="Mesh axes and sizes, as in 'data=2,expert=4', with optional roles after semicolons, as in "
        "'data=2,expert=4; tokens=data; heads=expert'.",
        show_default="all devices, as many as divide the model on expert",
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        help="Hardware that the policy estimates times for: a name such as h100, or a file written by "
        "moe-jax bench --calibrate.",
        show_default="the devices",
    ),
]
MaxLength = Annotated[
    int | None, typer.Option(help="Maximum positions of a sequence, prompt included.", show_default="the model's")
]


def _members(*names: str) -> dict[str, str]:
    """Return the members of an enum, each named like its value."""
    return {name: name for name in names}


# The enums below take their members from dictionaries. Type checkers accept such an enum as an annotation if it is
# written as a class.


class CombineName(StrEnum):
    """Names of the combine strategies, and `auto`."""

    vars().update(_members(AUTO, *COMBINES))


class ResidualName(StrEnum):
    """Names of the residual layouts, and `auto`."""

    vars().update(_members(AUTO, *RESIDUAL_LAYOUTS))


class GatherDtype(StrEnum):
    """Names of the encodings of gathered rows."""

    vars().update(_members(*GATHER_DTYPES))


AUTO_COMBINE, AUTO_RESIDUAL, EXACT_GATHER = CombineName(AUTO), ResidualName(AUTO), GatherDtype(GATHER_DTYPES[0])


@dataclass(frozen=True)
class ModelOptions:
    """A checkpoint, its mesh and its precision."""

    model: Annotated[Path | None, typer.Option(help="Checkpoint directory.", show_default="the bundled model")] = None
    mesh: Mesh = None
    dtype: Annotated[str | None, typer.Option(help="Dtype of weights and computation.", show_default="as saved")] = None
    weight_dtype: Annotated[
        WeightDtype,
        typer.Option(help="Precision of attention and feed-forward matrices; exact keeps the dtype of computation."),
    ] = WeightDtype.EXACT
    gather_dtype: Annotated[
        GatherDtype, typer.Option(help="Precision of the rows gathered for feed-forward blocks.")
    ] = EXACT_GATHER

    def load(self, **others: Any) -> LLM:
        """Load the model, with any other arguments of `LLM`."""
        from moe_jax.llm.llm import LLM

        arguments = asdict(self)
        model = arguments.pop("model")
        return LLM(*([] if model is None else [model]), **arguments, **others)


@dataclass(frozen=True)
class RouteOptions:
    """The route of rows through the layers, and how the layers are compiled."""

    combine: Annotated[CombineName, typer.Option(help="Strategy that combines the outputs of feed-forward blocks.")] = (
        AUTO_COMBINE
    )
    residual: Annotated[
        ResidualName,
        typer.Option(
            help="Residual rows on devices that split attention heads: whole on each, or split between them "
            "(sequence parallelism)."
        ),
    ] = AUTO_RESIDUAL
    hardware: Hardware = None
    scan_layers: Annotated[
        bool,
        typer.Option(help="Compile repeated layers as one loop; compilation is faster, but steps copy more weights."),
    ] = True


@dataclass(frozen=True)
class EngineOptions:
    """The sizes of the engine's batches and cache."""

    max_length: MaxLength = Options.max_length
    max_batch_size: Annotated[int, typer.Option(help="Maximum sequences decoded together.")] = Options.max_batch_size
    max_n: Annotated[int, typer.Option(help="Maximum samples of a prompt, in the lines of a file.")] = MAX_N
    prefill_tokens: Annotated[int, typer.Option(help="Maximum prompt tokens per step on each token shard.")] = (
        Options.prefill_tokens
    )
    decode_steps: Annotated[
        int, typer.Option(help="Decode steps that the devices run before the host reads the tokens.")
    ] = Options.decode_steps
    cache_pages: Annotated[
        int | None,
        typer.Option(
            help=f"KV cache pages, of {PAGE} positions each, on each token shard.", show_default="as memory allows"
        ),
    ] = Options.cache_pages
    cache_memory: Annotated[
        float | None,
        typer.Option(
            help="Share of each device's free memory, after the weights, that the KV cache may take.",
            show_default=f"{ACCELERATOR_SHARE} of an accelerator's, {CPU_SHARE} of a CPU's",
        ),
    ] = Options.cache_memory
    prefix_cache: Annotated[bool, typer.Option(help="Share the cached pages of common prompt prefixes.")] = (
        Options.prefix_cache
    )

    def options(self) -> Options:
        """Return the options of an engine."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(self) if field.name != "max_n"})
