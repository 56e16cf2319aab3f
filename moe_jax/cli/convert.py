"""The command `moe-jax convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_jax.cli.options import Mesh


class Format(StrEnum):
    """Checkpoint formats."""

    ORBAX = "orbax"
    HUGGING_FACE = "huggingface"


def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint directory in any supported format.")],
    output: Annotated[Path, typer.Argument(help="New directory for the converted checkpoint.")],
    to: Annotated[Format, typer.Option(help="Format to write.")],
    mesh: Mesh = None,
) -> None:
    """Rewrite a checkpoint in another format. Tensors of Hugging Face files keep the dtypes that they came with."""
    from moe_jax.checkpoints import Checkpoint
    from moe_jax.checkpoints.directories import check_new
    from moe_jax.models import ShardedDecoder
    from moe_jax.sharding import placement_for

    checkpoint = Checkpoint(source)
    check_new(output)
    placement = placement_for(checkpoint.config, mesh)
    dtype = checkpoint.exact_dtype(placement) if to is Format.HUGGING_FACE else checkpoint.dtype
    decoder = ShardedDecoder(checkpoint.config, placement, dtype)
    parameters = checkpoint.load(decoder)
    if to is Format.ORBAX:
        checkpoint.save_orbax(output, parameters)
    else:
        checkpoint.save_hugging_face(output, decoder, parameters)
    typer.echo(f"written to {output}")
