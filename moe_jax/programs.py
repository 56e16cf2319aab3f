"""The compiled steps of a decoder: one program for each shape of step, compiled once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.stages import Compiled
from jaxtyping import Array

from moe_jax.models import Batch, Caches, Parameters, ShardedDecoder, pack
from moe_jax.sampling import Knobs, Sampled, sample
from moe_jax.sharding import Route


class Programs:
    """Compiles on the first use of a shape and keeps the result."""

    def __init__(self, decoder: ShardedDecoder, options: Mapping[str, Any] | None = None) -> None:
        """`options` are XLA's."""
        self.decoder = decoder
        self._options = dict(options or {})
        self._shardings = jax.tree.map(lambda s: NamedSharding(decoder.placement.mesh, s), decoder.batch_specs)
        self.compiled: dict[Any, Compiled] = {}
        self.compile_seconds = 0.0

    def next_tokens(
        self, parameters: Parameters, caches: Caches, batch: Batch, knobs: Knobs | None, *, route: Route
    ) -> tuple[Sampled, Caches]:
        """The token after the last row of every slot, the likeliest one if there are no knobs.

        The caches given are overwritten: use those returned.
        """
        args = (
            parameters,
            caches,
            jax.device_put(batch, self._shardings),
            jax.device_put(knobs, self._shardings.tokens),
        )
        return self._compile(_next_tokens, route, *args)(*args)

    def all_logits(self, parameters: Parameters, caches: Caches, batch: Batch, *, route: Route) -> tuple[Array, Caches]:
        """The logits after every row. The caches given are overwritten: use those returned."""
        args = (parameters, caches, jax.device_put(batch, self._shardings))
        return self._compile(ShardedDecoder.all_logits, route, *args)(*args)

    def decode_step(self, slots: int, positions: int, capacity: int, route: Route) -> Compiled:
        """The program that takes one token from each slot, up to `capacity` on a token shard, and gives the likeliest
        next one.

        It needs neither weights nor the devices to be there.
        """
        decoder = self.decoder
        batch, _ = pack([], decoder.placement, slots=slots, chunk=1, capacity=capacity)
        shardings = jax.tree.broadcast(self._shardings, batch)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, shardings)
        caches = decoder.abstract_caches(slots, positions)
        return self._compile(_next_tokens, route, decoder.parameters, caches, abstract, None)

    def _compile(self, function: Callable[..., Any], route: Route, *args: Any) -> Compiled:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
        key = (function, route, jax.tree.structure(args), shapes)
        if key not in self.compiled:
            began = time.perf_counter()

            def program(*args: Any) -> Any:
                return function(self.decoder, *args, route)

            program.__name__ = function.__name__.strip("_")  # what profiles call it
            self.compiled[key] = jax.jit(program, donate_argnums=1).lower(*args).compile(self._options)
            self.compile_seconds += time.perf_counter() - began
        return self.compiled[key]


def _next_tokens(
    decoder: ShardedDecoder, parameters: Parameters, caches: Caches, batch: Batch, knobs: Knobs | None, route: Route
) -> tuple[Sampled, Caches]:
    logits, caches = decoder.next_logits(parameters, caches, batch, route)
    spec = decoder.rows_spec
    with jax.named_scope("sample"):
        sampler = jax.shard_map(sample, mesh=decoder.placement.mesh, in_specs=spec, out_specs=spec)
        return sampler(logits, knobs), caches
