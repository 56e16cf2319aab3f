"""Compiled programs of a decoder: one for each kind and shape of step.

S  slots of a token shard     P  positions of a sequence     L  segments of a token shard
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, Int32

from moe_jax.config.engine_options import PAGE
from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.models import BatchShape, Caches, Parameters, Segments, ShardedDecoder, pack, zeros
from moe_jax.models.decoder import Decoder
from moe_jax.programs.decoding import advance, decode
from moe_jax.programs.denoising import denoise
from moe_jax.programs.diffusion_input import DiffusionSlots, DiffusionStepInput
from moe_jax.programs.outputs import RowLogprobs
from moe_jax.programs.packed_buffer import PackedBuffer
from moe_jax.programs.sampling import SamplingMetadata
from moe_jax.programs.step_input import Slots, StepInput
from moe_jax.sharding import Role, Route

logger = logging.getLogger(__name__)


class Programs:
    """Cache of compiled programs: each is compiled on its first use."""

    def __init__(self, decoder: ShardedDecoder, options: Mapping[str, Any] | None = None) -> None:
        """`options` are XLA compiler options."""
        self.decoder = decoder
        self.compilations = 0
        self.compile_seconds = 0.0
        self._options = dict(options or {})
        self._compiled: dict[Any, Compiled] = {}
        self._shardings = self._named_shardings((decoder.rows_spec, PartitionSpec()))
        """Shardings of the two arrays of a packed buffer."""

    def run(
        self, parameters: Parameters, caches: Caches, slots: Slots, step_input: StepInput, route: Route
    ) -> tuple[Int32[Array, "shards*L W"], RowLogprobs | None, Slots, Caches]:
        """Run one dispatch: `advance`, `decode` or `denoise`, depending on the input.

        `caches` and `slots` are donated: use the returned ones.

        Returns:
          The packed `SampledTokens`, the scores of targets, slots and caches. The call returns before they are ready.
        """
        args = parameters, caches, slots, self.on_devices(step_input)
        return self._program(route, step_input, *args)(*args)

    def decode_step(self, segments: int, positions: int, route: Route) -> Compiled:
        """Compile a greedy step of `segments` sequences (or blocks) on each token shard, over full caches.

        Neither weights nor physical devices are needed: the mesh may be one of `analysis.targets`.
        """
        decoder, pages, block = self.decoder, -(-positions // PAGE), self.decoder.config.block
        tables = tuple((window, pages) for window in decoder.windows)
        shards = decoder.placement.size(Role.TOKENS)
        shape = BatchShape((QueryLayout(segments, block),), segments * block, tables)
        batch, _ = pack([[Segments(len(tables))]] * shards, shape, decoder.placement)
        numbers: Any = np.zeros(shards * segments, np.int32)
        step_input = StepInput(batch, numbers, numbers == 0, None)
        if (diffusion := decoder.config.diffusion) is not None:
            step_input = DiffusionStepInput(batch, numbers, numbers == 0, None, limits=numbers, diffusion=diffusion)
        caches = decoder.abstract_caches(dict.fromkeys(decoder.windows, segments * pages), PAGE, segments)
        packed = self._pack(step_input).map(_abstract, *self._shardings)
        slots = self.abstract_slots(segments, positions)
        return self._program(route, step_input, decoder.parameters, caches, slots, packed)

    def abstract_slots(self, slots: int, positions: int) -> Slots:
        """Shapes, dtypes and shardings of `slots` slots on each token shard."""
        shards = self.decoder.placement.size(Role.TOKENS)
        sharding = NamedSharding(self.decoder.placement.mesh, self.decoder.rows_spec)

        def rows(row: jax.ShapeDtypeStruct | Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((shards * slots, *row.shape[1:]), row.dtype, sharding=sharding)

        token_buffer = jax.ShapeDtypeStruct((1, positions), jnp.int32)
        slot = Slots(token_buffer, SamplingMetadata.of([None]))  # type: ignore[arg-type]
        diffusion = self.decoder.config.diffusion
        return jax.tree.map(rows, slot if diffusion is None else DiffusionSlots.of(slot, diffusion.block))

    def empty_slots(self, slots: int, positions: int) -> Slots:
        return zeros(self.abstract_slots(slots, positions))

    def on_devices(self, step_input: StepInput) -> PackedBuffer:
        """Copy a step's input to the devices. Each device gets its own part."""
        return self._pack(step_input).map(_place, *self._shardings)

    def _pack(self, step_input: StepInput) -> PackedBuffer:
        split = jax.tree.map(lambda _: True, step_input)
        split = replace(split, batch=step_input.batch.labelled(True, False))
        return PackedBuffer.pack(step_input, split, self.decoder.placement.size(Role.TOKENS))

    def _program(self, route: Route, step_input: StepInput, *args: Any) -> Compiled:
        """Return the compiled program for these arguments; compile it on the first call."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args[1:]))
        key = (route, jax.tree.structure(args[1:]), shapes)
        if key not in self._compiled:
            self._compiled[key] = self._compile(route, step_input, *args)
        return self._compiled[key]

    def _compile(self, route: Route, step_input: StepInput, *args: Any) -> Compiled:
        name, rows = _step_function(step_input).__name__, step_input.batch.capacity
        logger.info("compiling the step %s of %d rows on each token shard", name, rows)
        began = time.perf_counter()
        program = self._jit(route, step_input, args[-1]).lower(*args).compile(self._options)
        seconds = time.perf_counter() - began
        logger.info("compiled the step %s in %.1f s", name, seconds)
        self.compile_seconds += seconds
        self.compilations += 1
        return program

    def _jit(self, route: Route, step_input: StepInput, packed: PackedBuffer) -> Any:
        step = _step_function(step_input)

        def run(decoder: Decoder, caches: Caches, slots: Slots, packed: PackedBuffer) -> Any:
            return step(decoder, caches, slots, packed.unpack(), route)

        rows, caches = self.decoder.rows_spec, self.decoder.cache_spec
        specs = replace(packed, split=rows, same=PartitionSpec())
        program = self.decoder.per_device(run, (caches, rows, specs), (rows, rows, rows, caches))
        program.__name__ = step.__name__  # shown in profiles
        results = PartitionSpec() if jax.process_count() > 1 else rows  # a process reads its own devices only
        shardings = self._named_shardings((results, results, rows, caches))
        return jax.jit(program, donate_argnums=(1, 2), out_shardings=shardings)

    def _named_shardings(self, specs: Any) -> Any:
        mesh = self.decoder.placement.mesh
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )


def _step_function(step_input: StepInput) -> Callable[..., Any]:
    """Select the per-device function that runs an input."""
    match step_input:
        case DiffusionStepInput():
            return denoise
        case StepInput(limits=None):
            return advance
        case _:
            return decode


def _place(array: np.ndarray, sharding: NamedSharding) -> Array:
    """Copy an array to the devices of all processes. Every process has the whole array on its host."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _abstract(array: np.ndarray, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
