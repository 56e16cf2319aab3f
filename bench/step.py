"""A decode step compiled to be called again and again, and beside it the collectives of its feed-forward blocks alone.

T  rows of a token shard, one for each of as many slots     N  gathered rows     D  hidden
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from bench.combine import exchange
from bench.timing import Program, Times, sends
from moe_jax.batching import Seat, Segment
from moe_jax.config import LayerConfig, MoEConfig
from moe_jax.models import Batch, Parameters, ShardedDecoder, group_layers, pack
from moe_jax.programs import Programs
from moe_jax.sharding import Combine, Role, Route, Rows
from moe_jax.sharding.census import Collective, collectives

SCOPES = ("attention", "ffn", "route", "gather", "experts", "combine", "head", "sample")


class Decode:
    """Greedy decode from empty caches, a step in each call; and a program of its `gather_and_combine` alone."""

    def __init__(
        self, decoder: ShardedDecoder, parameters: Parameters, batches: list[Batch], positions: int, combine: Combine
    ) -> None:
        slots = batches[0].rows.capacity
        self.compiled = Programs(decoder).decode_step(slots, positions, slots, Route.whole(combine))
        self.collectives = collectives(self.compiled.as_text() or "")
        self.alone = gather_and_combine(decoder, batches[0].rows, combine)
        self.tokens = [batches[0].tokens]
        self._parameters, self._batches = parameters, batches
        self._caches = decoder.empty_caches(slots, positions)

    def __call__(self) -> Int[Array, "shards*T"]:
        """The next token of every sequence, which is a row of the next step as it is."""
        batch = replace(self._batches[len(self.tokens) - 1], tokens=self.tokens[-1])
        sampled, self._caches = self.compiled(self._parameters, self._caches, batch, None)
        self.tokens.append(sampled.tokens)
        return sampled.tokens

    @property
    def is_alike(self) -> bool:
        """Whether the feed-forward blocks of a step send anything, and the program `alone` just that."""
        blocks = [c for c in self.collectives if _in_block(c)]
        return bool(blocks) and sends(blocks) == sends(self.alone.collectives)

    @property
    def scopes(self) -> set[str]:
        """Those of `SCOPES` that the compiled program, and so a trace of it, names."""
        names = re.findall(r'op_name="([^"]*)"', self.compiled.as_text() or "")
        return {scope for name in names for scope in name.split("/")[:-1]} & set(SCOPES)

    def profile(self, step: Times, alone: Times | None) -> dict[str, Any]:
        compute = step.median - alone.median if alone else 0.0
        return {
            **sends(self.collectives),
            "outside": sum(c.times for c in self.collectives if not _in_block(c)),
            "collective": alone.as_dict() if alone else None,
            "collective_to_compute": alone.median / compute if alone and compute > 0 else None,
            "step": step.as_dict(),
            "tokens_per_second": self.tokens[0].size / step.median,
        }


def _in_block(collective: Collective) -> bool:
    """Whether it belongs to a feed-forward block."""
    return "ffn" in collective.scope.split("/")


def gather_and_combine(decoder: ShardedDecoder, rows: Rows, combine: Combine) -> Program:
    """What the feed-forward blocks of a step send, in the same loops, and hardly anything else."""
    here, config = decoder.placement, decoder.config
    tokens, parts = decoder.rows_spec, here.spec((Role.PARTIAL,), (0,))

    def block(x: Float[Array, "T D"], own: Float[Array, "1"], rows: Rows, layer: LayerConfig) -> Float[Array, "T D"]:
        top_k = layer.ffn.top_k if isinstance(layer.ffn, MoEConfig) else 0
        routing = [x[:, :top_k].astype(dtype) for dtype in (jnp.int32, jnp.float32)] if top_k else []

        def part(x: Float[Array, "N D"], *routing: Array) -> Float[Array, "N D"]:
            return (x + own + sum(map(jnp.sum, routing))).astype(x.dtype)

        return exchange(combine, rows, x, *routing, part=part)

    def run(x: Float[Array, "T D"], own: Float[Array, "1"], rows: Rows) -> Float[Array, "T D"]:
        for group in group_layers(config.layers):

            def unit(x: Array, _: None, layers: tuple[LayerConfig, ...] = group.unit) -> tuple[Array, None]:
                for layer in layers:
                    x = block(x, own, rows, layer)
                return x, None

            x, _ = lax.scan(unit, x, length=group.repeats)
        return x

    mapped = jax.shard_map(run, mesh=here.mesh, in_specs=(tokens, parts, here.spec((), ())), out_specs=tokens)
    shape = (here.size(Role.TOKENS) * rows.capacity, config.hidden)
    x = jnp.zeros(shape, decoder.dtype, device=NamedSharding(here.mesh, tokens))
    own = jnp.zeros(here.size(Role.PARTIAL), decoder.dtype, device=NamedSharding(here.mesh, parts))
    return Program.of(mapped, x, own, rows)


def prepared(decoder: ShardedDecoder, sequences: int, steps: int) -> list[Batch]:
    """The batch of each step, on the devices; of all but the first, the tokens are yet to be put in."""
    here, random = decoder.placement, np.random.default_rng(0)
    seats = [Seat(shard, slot) for shard in range(here.size(Role.TOKENS)) for slot in range(sequences)]
    first = random.integers(decoder.config.vocab_size, size=len(seats)).tolist()
    shardings = jax.tree.map(lambda spec: NamedSharding(here.mesh, spec), decoder.batch_specs)
    batches = []
    for step in range(steps):
        segments = [Segment(i, seat, step, [first[i]]) for i, seat in enumerate(seats)]
        batch, _ = pack(segments, here, slots=sequences, chunk=1, capacity=sequences)
        batches.append(jax.device_put(batch, shardings))
    return batches
