"""What collectives take on this machine, measured, and the two terms that the policy reckons with, fitted to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from moe_jax.errors import PlacementError
from moe_jax.sharding import Hardware, Placement
from moe_jax.sharding.collectives import all_gather, partial_sum, reduce
from moe_jax.sharding.hardware import Link, of_kind
from moe_jax.sharding.traffic import Kind, Move

KINDS = (Kind.ALL_GATHER, Kind.REDUCE_SCATTER, Kind.ALL_REDUCE)
ROWS, WIDTH = (64, 512, 4096), 1024
ROW_BYTES = WIDTH * jnp.dtype(jnp.bfloat16).itemsize


@dataclass(frozen=True)
class Sample:
    move: Move
    seconds: float
    """Median of the repeats."""


def measure(placement: Placement, repeats: int) -> list[Sample]:
    """Each kind of collective over the placement's token shards, with few rows and many; all of them in turn, so that
    what disturbs one disturbs the others.

    Raises:
      PlacementError: there is but one token shard.
    """
    axes = placement.scatter_axes
    if not axes:
        raise PlacementError(f"nothing is scattered on {placement}: give a mesh such as 'expert=8'")
    moves = [Move(kind, axes, placement.gather_shards, rows, ROW_BYTES) for kind in KINDS for rows in ROWS]
    programs = [_program(placement, move) for move in moves]
    seconds = [[] for _ in moves]
    for repeat in range(repeats + 1):
        for program, found in zip(programs, seconds, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(program())
            if repeat:  # the first compiles
                found.append(time.perf_counter() - began)
    return [Sample(move, float(np.median(found))) for move, found in zip(moves, seconds, strict=True)]


def fit(samples: Sequence[Sample]) -> Hardware:
    """The known record of this kind of device, with the launch and local bandwidth that err least, relatively."""
    seconds = np.array([sample.seconds for sample in samples])
    terms = np.array([[1.0, sample.move.sent_bytes] for sample in samples]) / seconds[:, None]
    (launch, per_byte), *_ = np.linalg.lstsq(terms, np.ones(len(samples)), rcond=None)
    kind = jax.devices()[0].device_kind
    link = Link(bandwidth=float(1 / max(per_byte, 1e-15)), latency=0.0)
    return replace(of_kind(kind), local=link, launch=float(max(launch, 0.0)), source=f"measured on {kind}")


def _program(placement: Placement, move: Move) -> Callable[[], Array]:
    """The collective alone, compiled for its own argument."""
    axes, spec = move.axes, PartitionSpec(move.axes)

    def run(value: Array) -> Array:
        match move.kind:
            case Kind.ALL_GATHER:
                return all_gather(value, axes)
            case Kind.REDUCE_SCATTER:
                return reduce(partial_sum(value, axes), scatter_over=axes)
            case Kind.ALL_REDUCE:
                return reduce(partial_sum(value, axes), sum_over=axes)
            case _:
                raise AssertionError(f"{move.kind} is not among {KINDS}")

    out_spec = PartitionSpec() if move.kind is Kind.ALL_REDUCE else spec
    rows = move.rows if move.kind is Kind.ALL_GATHER else move.rows * move.devices
    value = jnp.ones((rows, WIDTH), jnp.bfloat16, device=NamedSharding(placement.mesh, spec))
    return partial(jax.jit(jax.shard_map(run, mesh=placement.mesh, in_specs=spec, out_specs=out_spec)), value)
