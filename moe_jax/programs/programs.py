"""One program for each shape of step, compiled once.

S  slots of a token shard     P  positions of a sequence
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, Int32

from moe_jax.layers import Grid
from moe_jax.models import Batch, Caches, Lines, Parameters, Shape, ShardedDecoder, pack, zeros
from moe_jax.models.decoder import Decoder
from moe_jax.programs.denoising import BlockSlots, BlockTurn, denoise
from moe_jax.programs.parcel import Parcel
from moe_jax.programs.steps import Asked, Scored, Slots, Turn, advance, decode
from moe_jax.sampling import Knobs
from moe_jax.sharding import Role, Route

PAGE = 16
"""Positions of a page."""


class Programs:
    """Compiles on the first use of a shape and keeps the result."""

    def __init__(self, decoder: ShardedDecoder, options: Mapping[str, Any] | None = None) -> None:
        """`options` are XLA's."""
        self.decoder = decoder
        self._options = dict(options or {})
        self._compiled: dict[Any, Compiled] = {}
        self._shardings = self._named((decoder.rows_spec, PartitionSpec()))
        """Of a parcel's two arrays."""
        self.compilations = 0
        self.compile_seconds = 0.0

    def advance(
        self, parameters: Parameters, caches: Caches, slots: Slots, turn: Turn, *, route: Route, asked: Asked
    ) -> tuple[Int32[Array, "shards*L W"], Scored | None, Slots, Caches]:
        """One step: `steps.advance`. The caches and slots given are overwritten: use those returned."""
        run = partial(advance, route=route, asked=asked)
        return self._run(run, parameters, caches, slots, self.on_devices(turn))

    def decode(
        self,
        parameters: Parameters,
        caches: Caches,
        slots: Slots,
        turn: Turn,
        budgets: Int32[Array, "shards*L"],
        *,
        most: int,
        route: Route,
        asked: Asked,
    ) -> tuple[Int32[Array, "shards*L W"], None, Slots, Caches]:
        """Several steps: `steps.decode`. The caches and slots given are overwritten: use those returned."""
        asked = replace(asked, logits=False)  # there are no prompts
        run = partial(decode, most=most, route=route, asked=asked)
        return self._run(run, parameters, caches, slots, self.on_devices(turn, budgets))

    def denoise(
        self,
        parameters: Parameters,
        caches: Caches,
        slots: BlockSlots,
        turn: BlockTurn,
        limits: Int32[Array, "shards*D"],
        *,
        most: int,
        route: Route,
        asked: Asked,
    ) -> tuple[Int32[Array, "shards*D W"], Scored | None, BlockSlots, Caches]:
        """Steps of a model that decodes blocks: `denoising.denoise`. The caches and slots given are overwritten: use
        those returned."""
        diffusion = self.decoder.config.diffusion
        assert diffusion is not None, "it decodes blocks"
        run = partial(denoise, most=most, route=route, asked=asked, diffusion=diffusion)
        return self._run(run, parameters, caches, slots, self.on_devices(turn, limits))

    def decode_step(self, lines: int, positions: int, route: Route) -> Compiled:
        """The program that gives the likeliest next token of as many sequences on each token shard, over full caches;
        or chooses some of the tokens of a block.

        It needs neither weights nor the devices to be there.
        """
        decoder, pages, block = self.decoder, -(-positions // PAGE), self.decoder.config.block
        tables = tuple((window, pages) for window in decoder.windows)
        shards = decoder.placement.size(Role.TOKENS)
        batch, _ = pack(
            [[Lines(len(tables))]] * shards, Shape((Grid(lines, block),), lines * block, tables), decoder.placement
        )
        nowhere, all_draw = np.zeros(shards * lines, np.int32), np.ones(shards * lines, bool)
        if (diffusion := decoder.config.diffusion) is None:
            step = partial(advance, route=route, asked=Asked())
            parcel = self._parcel(Turn(batch, nowhere, all_draw, None))  # type: ignore[arg-type]
        else:
            step = partial(denoise, most=1, route=route, asked=Asked(), diffusion=diffusion)
            parcel = self._parcel(BlockTurn(batch, nowhere, all_draw, None), nowhere)  # type: ignore[arg-type]
        abstract = parcel.each(_abstract, *self._shardings)
        caches = decoder.abstract_caches(dict.fromkeys(decoder.windows, lines * pages), PAGE, lines)
        return self._compile(step, decoder.parameters, caches, self.abstract_slots(lines, positions), abstract)

    def abstract_slots(self, slots: int, positions: int) -> Slots:
        """Shapes, dtypes and shardings for `slots` requests on each token shard."""
        shards = self.decoder.placement.size(Role.TOKENS)
        sharding = NamedSharding(self.decoder.placement.mesh, self.decoder.rows_spec)

        def rows(row: jax.ShapeDtypeStruct | Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((shards * slots, *row.shape[1:]), row.dtype, sharding=sharding)

        tape = jax.ShapeDtypeStruct((1, positions), jnp.int32)
        slot = Slots(tape, Knobs.of([None]))  # type: ignore[arg-type]
        diffusion = self.decoder.config.diffusion
        return jax.tree.map(rows, slot if diffusion is None else BlockSlots.of(slot, diffusion.block))

    def empty_slots(self, slots: int, positions: int) -> Slots:
        return zeros(self.abstract_slots(slots, positions))

    def on_devices(self, turn: Turn, *budgets: Int32[Array, "shards*L"]) -> Parcel:
        """What a step takes, on the devices that take it."""
        return self._parcel(turn, *budgets).each(_placed, *self._shardings)

    def _parcel(self, *contents: Any) -> Parcel:
        """Split by token shard, all but the counts of rows."""
        turn, *rest = contents
        split = type(turn)(**{part.name: True for part in fields(turn)} | {"batch": Batch(True, True, False)})  # type: ignore[arg-type]
        return Parcel.wrap(contents, (split, *(True for _ in rest)), self.decoder.placement.size(Role.TOKENS))

    def _run(self, step: partial[Any], parameters: Parameters, *args: Any) -> Any:
        return self._compile(step, parameters, *args)(parameters, *args)

    def _compile(self, step: partial[Any], parameters: Parameters, *args: Any) -> Compiled:
        """The program of a step, written for one device, over parameters, caches, slots and a parcel."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        key = (step.func, *step.keywords.values(), jax.tree.structure(args), shapes)
        if key not in self._compiled:
            began = time.perf_counter()
            program = self._program(step, args[-1])
            self._compiled[key] = program.lower(parameters, *args).compile(self._options)
            self.compile_seconds += time.perf_counter() - began
            self.compilations += 1
        return self._compiled[key]

    def _program(self, step: partial[Any], parcel: Parcel) -> Any:
        def run(decoder: Decoder, caches: Caches, slots: Slots, parcel: Parcel) -> Any:
            return step(decoder, caches, slots, *parcel.open())

        rows, caches = self.decoder.rows_spec, self.decoder.cache_spec
        specs = replace(parcel, split=rows, same=PartitionSpec())
        program = self.decoder.per_device(run, (caches, rows, specs), (rows, rows, rows, caches))
        program.__name__ = step.func.__name__  # what profiles call it
        results = PartitionSpec() if jax.process_count() > 1 else rows  # each process can read its own devices
        kept = self._named((results, results, rows, caches))
        return jax.jit(program, donate_argnums=(1, 2), out_shardings=kept)

    def _named(self, specs: Any) -> Any:
        mesh = self.decoder.placement.mesh
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
        )


def _placed(array: np.ndarray, sharding: NamedSharding) -> Array:
    """An array over the devices of all processes, each of which has the whole on its host."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _abstract(array: np.ndarray, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
