"""One program for each shape of step, compiled once.

S  slots of a token shard     P  positions of a sequence
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled
from jaxtyping import Array, Int32

from moe_jax.layers import Grid
from moe_jax.models import Caches, Parameters, Shape, ShardedDecoder, pack
from moe_jax.programs.steps import Asked, Drawn, Scored, Slots, Turn, advance, decode
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
        self.compilations = 0
        self.compile_seconds = 0.0

    def advance(
        self, parameters: Parameters, caches: Caches, slots: Slots, turn: Turn, *, route: Route, asked: Asked
    ) -> tuple[Drawn, Scored | None, Slots, Caches]:
        """One step: `steps.advance`. The caches and slots given are overwritten: use those returned."""
        run = partial(advance, route=route, asked=asked)
        args = (parameters, caches, slots, self.on_devices(turn))
        return self._compile((advance, route, asked), run, (self._turn_specs,), *args)(*args)

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
    ) -> tuple[Drawn, None, Slots, Caches]:
        """Several steps: `steps.decode`. The caches and slots given are overwritten: use those returned."""
        asked = replace(asked, logits=False)  # there are no prompts
        run, specs = partial(decode, most=most, route=route, asked=asked), (self._turn_specs, self.decoder.rows_spec)
        args = (parameters, caches, slots, *self._on_devices((turn, budgets), specs))
        return self._compile((decode, most, route, asked), run, specs, *args)(*args)

    def decode_step(self, lines: int, positions: int, route: Route) -> Compiled:
        """The program that gives the likeliest next token of as many sequences on each token shard, over full caches.

        It needs neither weights nor the devices to be there.
        """
        decoder, pages = self.decoder, -(-positions // PAGE)
        tables = tuple((window, pages) for window in decoder.windows)
        shards = decoder.placement.size(Role.TOKENS)
        batch, _ = pack([[[]]] * shards, Shape((Grid(lines, 1),), lines, tables), decoder.placement)
        turn = Turn(batch, np.zeros(shards * lines, np.int32), np.ones(shards * lines, bool), None)  # type: ignore[arg-type]
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            turn,
            jax.tree.broadcast(self._shardings(self._turn_specs), turn),
        )
        caches = decoder.abstract_caches(dict.fromkeys(decoder.windows, lines * pages), PAGE)
        run = partial(advance, route=route, asked=Asked())
        args = (decoder.parameters, caches, self.abstract_slots(lines, positions), abstract)
        return self._compile((advance, route, Asked()), run, (self._turn_specs,), *args)

    def abstract_slots(self, slots: int, positions: int) -> Slots:
        """Shapes, dtypes and shardings for `slots` requests on each token shard."""
        shards = self.decoder.placement.size(Role.TOKENS)
        sharding = NamedSharding(self.decoder.placement.mesh, self.decoder.rows_spec)

        def rows(row: jax.ShapeDtypeStruct | Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((shards * slots, *row.shape[1:]), row.dtype, sharding=sharding)

        tape = jax.ShapeDtypeStruct((1, positions), jnp.int32)
        return jax.tree.map(rows, Slots(tape, Knobs.of([None])))  # type: ignore[arg-type]

    def empty_slots(self, slots: int, positions: int) -> Slots:
        abstract = self.abstract_slots(slots, positions)
        return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), abstract)

    def on_devices(self, turn: Turn) -> Turn:
        """Its arrays on the devices that take them."""
        return self._on_devices(turn, self._turn_specs)

    def _compile(self, key: Any, step: Callable[..., Any], specs: tuple[Any, ...], *args: Any) -> Compiled:
        """The program of a step, written for one device, over parameters, caches, slots and what `specs` split."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        key = (*key, jax.tree.structure(args), shapes)
        if key not in self._compiled:
            began = time.perf_counter()
            rows, caches = self.decoder.rows_spec, self.decoder.cache_spec
            program = self.decoder.per_device(step, (caches, rows, *specs), (rows, rows, rows, caches))
            program.__name__ = key[0].__name__  # what profiles call it
            results = PartitionSpec() if jax.process_count() > 1 else rows  # each process can read its own devices
            kept = self._shardings((results, results, rows, caches))
            step = jax.jit(program, donate_argnums=(1, 2), out_shardings=kept)
            self._compiled[key] = step.lower(*args).compile(self._options)
            self.compile_seconds += time.perf_counter() - began
            self.compilations += 1
        return self._compiled[key]

    @property
    def _turn_specs(self) -> Turn:
        rows = self.decoder.rows_spec
        return Turn(self.decoder.batch_specs, rows, rows, rows, rows)  # type: ignore[arg-type]

    def _shardings(self, specs: Any) -> Any:
        mesh = self.decoder.placement.mesh
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)

    def _on_devices(self, tree: Any, specs: Any) -> Any:
        shardings = jax.tree.broadcast(self._shardings(specs), tree)
        return jax.device_put(tree, shardings) if jax.process_count() == 1 else jax.tree.map(_own_part, tree, shardings)


def _own_part(array: np.ndarray, sharding: NamedSharding) -> Array:
    """An array over the devices of all processes, each of which has the whole on its host."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
