"""The command `moe-jax bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_jax.cli.options import Hardware, Mesh
from moe_jax.cli.output import Json, print_json
from moe_jax.errors import ConfigError

if TYPE_CHECKING:
    from moe_jax.sharding import Hardware as HardwareRecord


def bench(
    mesh: Mesh = None,
    repeats: Annotated[int, typer.Option(help="Number of timed calls of each collective.", min=1)] = 30,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="File for a hardware record fitted to the measured times; --hardware reads such a record.",
            show_default="none",
        ),
    ] = None,
    hardware: Hardware = None,
    as_json: Json = False,
) -> None:
    """Time collectives on these devices, next to the times that the policy estimates."""
    from moe_jax.analysis.calibration import measure
    from moe_jax.sharding import as_hardware, as_placement
    from moe_jax.sharding.hardware import save

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
        print_json({"hardware": asdict(record), "collectives": rows})
    else:
        typer.echo("\n".join([*map(_line, rows), _speeds(record)]))


def _line(row: dict[str, Any]) -> str:
    micro = f"{row['seconds'] * 1e6:10.0f} us measured {row['reckoned_seconds'] * 1e6:10.0f} us modelled"
    return f"{row['collective']:15} {row['rows']:5} rows {row['sent_bytes'] / 1024:9.0f} KiB sent {micro}"


def _speeds(record: HardwareRecord) -> str:
    sent, memory = record.local.bandwidth / 1e9, record.memory_bandwidth / 1e9
    return f"launch {record.launch * 1e6:.0f} us, {sent:.2f} GB/s sent, {memory:.2f} GB/s in memory ({record.source})"
