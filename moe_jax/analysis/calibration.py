"""Measured times of collectives on this machine, and a hardware record for the policy fitted to them."""

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
ROWS, WIDTH, COPIED, WARM_UP = (8, 64, 512, 4096), 1024, 2**23, 3
ROW_BYTES = WIDTH * jnp.dtype(jnp.bfloat16).itemsize


@dataclass(frozen=True)
class CollectiveTiming:
    """Measured time of one collective."""

    move: Move
    seconds: float
    """Median time of the repeats."""


@dataclass(frozen=True)
class Measurements:
    """Times of collectives over the token shards of a placement, and the memory bandwidth of its devices."""

    samples: Sequence[CollectiveTiming]
    """Timings of each kind of collective, with few and with many rows."""
    copied_per_second: float
    """Bytes per second that each device copies, while all devices copy."""

    def fit(self) -> Hardware:
        """Fit launch latency and local bandwidth to the samples, by least squares of the relative errors.

        The other figures are those of the known record for this kind of device.
        """
        from scipy.optimize import nnls  # imported here because it takes half a second

        kind = jax.devices()[0].device_kind
        known = of_kind(kind)
        devices = self.samples[0].move.devices if known.shared else 1
        seconds = np.array([sample.seconds for sample in self.samples])
        copied = np.array([sample.move.buffer_bytes for sample in self.samples]) / self.copied_per_second
        terms = np.array([[1.0, sample.move.sent_bytes * devices] for sample in self.samples]) / seconds[:, None]
        (launch, per_byte), _ = nnls(terms, np.clip(1 - copied / seconds, 0, None))
        return replace(
            known,
            local=Link(bandwidth=float(1 / max(per_byte, 1e-15)), latency=0.0),
            launch=float(launch),
            memory_bandwidth=2 * self.copied_per_second * devices,
            source=f"measured on {kind}",
        )


def measure(placement: Placement, repeats: int) -> Measurements:
    """Time a copy and the collectives over the token shards of a placement.

    Every repeat runs them in a new random order, so that disturbances spread over all of them.

    Raises:
      PlacementError: the placement has only one token shard.
    """
    axes = placement.scatter_axes
    if not axes:
        raise PlacementError(f"nothing is scattered on {placement}: use a mesh such as 'expert=8'")
    moves = [Move(kind, axes, placement.gather_shards, rows, ROW_BYTES) for kind in KINDS for rows in ROWS]
    programs = [_copy(placement), *(_collective(placement, move) for move in moves)]
    seconds = [[] for _ in programs]
    random = np.random.default_rng(0)
    for repeat in range(WARM_UP + repeats):
        for number in random.permutation(len(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[number]())
            if repeat >= WARM_UP:
                seconds[number].append(time.perf_counter() - start)
    copy, *medians = (float(np.median(times)) for times in seconds)
    samples = [CollectiveTiming(move, median) for move, median in zip(moves, medians, strict=True)]
    return Measurements(samples, COPIED / copy)


def _copy(placement: Placement) -> Callable[[], Array]:
    """Compile a program in which every device copies `COPIED` bytes."""
    devices = NamedSharding(placement.mesh, PartitionSpec(placement.mesh.axis_names))
    value = jnp.ones((placement.mesh.devices.size, COPIED), jnp.int8, device=devices)
    return partial(jax.jit(jnp.negative), value)


def _collective(placement: Placement, move: Move) -> Callable[[], Array]:
    """Compile a program of one collective, with its argument."""
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
                raise AssertionError(f"{move.kind} is not in {KINDS}")

    out_spec = PartitionSpec() if move.kind is Kind.ALL_REDUCE else spec
    rows = move.rows if move.kind is Kind.ALL_GATHER else move.rows * move.devices
    value = jnp.ones((rows, WIDTH), jnp.bfloat16, device=NamedSharding(placement.mesh, spec))
    return partial(jax.jit(jax.shard_map(run, mesh=placement.mesh, in_specs=spec, out_specs=out_spec)), value)
