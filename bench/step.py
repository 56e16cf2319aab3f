"""A decode step compiled to be called again and again, and beside it the collectives of its feed-forward blocks alone.

T  rows of a token shard, one for each of as many slots     N  gathered rows     D  hidden
"""

from __future__ import annotations

import re
from array import array
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int32

from bench.combine import exchange
from bench.timing import Program, Times, sends
from moe_jax.analysis.census import Collective, collectives
from moe_jax.config import LayerConfig, MoEConfig
from moe_jax.engine.step_inputs import FROM_BUFFER
from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.models import BatchShape, PageRange, Parameters, Segment, Segments, ShardedDecoder, pack
from moe_jax.programs import PAGE, PackedBuffer, Programs, SampledTokens, StepInput
from moe_jax.sharding import Combine, Role, Route, Rows
from moe_jax.sharding.rows import on_host

SCOPES = ("attention", "ffn", "route", "gather", "experts", "combine", "head", "sample")


class Decode:
    """Greedy decode from empty caches, a step in each call; and a program of its `gather_and_combine` alone."""

    def __init__(
        self,
        decoder: ShardedDecoder,
        parameters: Parameters,
        turns: list[PackedBuffer],
        rows: Rows,
        positions: int,
        combine: Combine,
    ) -> None:
        """`turns`: what each step takes."""
        programs, segments = Programs(decoder), rows.capacity
        self.compiled = programs.decode_step(segments, positions, Route.whole(combine))
        self.collectives = collectives(self.compiled.as_text() or "")
        self.alone = gather_and_combine(decoder, rows, combine)
        self._drawn: list[Int32[Array, "shards*T W"]] = []
        self._parameters, self._turns = parameters, turns
        pages = dict.fromkeys(decoder.windows, segments * -(-positions // PAGE))
        self._caches = decoder.empty_caches(pages, PAGE, segments)
        self._slots = programs.empty_slots(segments, positions)

    def __call__(self) -> Int32[Array, "shards*T W"]:
        """The next token of every sequence, joined with what else is drawn."""
        step_input = self._turns[len(self._drawn)]
        emitted, _, self._slots, self._caches = self.compiled(self._parameters, self._caches, self._slots, step_input)
        self._drawn.append(emitted)
        return emitted

    @property
    def tokens(self) -> Int32[Array, "steps shards*T"]:
        """Of every step so far."""
        return on_host(
            np.array([SampledTokens.unpack(np.asarray(emitted), top=0).tokens[:, 0] for emitted in self._drawn])
        )

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
        for group in decoder.groups:

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


def prepared(decoder: ShardedDecoder, sequences: int, positions: int, steps: int) -> list[PackedBuffer]:
    """What goes into each step, on the devices already; of all but the first, the tokens are known to them alone."""
    here, random, each = decoder.placement, np.random.default_rng(0), -(-positions // PAGE)
    shards, programs = here.size(Role.TOKENS), Programs(decoder)
    shape = BatchShape((QueryLayout(sequences, 1),), sequences, tuple((window, each) for window in decoder.windows))
    own = [
        [PageRange(0, array("i", range(segment * each, (segment + 1) * each)))] * len(decoder.windows)
        for segment in range(sequences)
    ]
    first = random.integers(decoder.config.vocab_size, size=(shards, sequences)).tolist()
    places = np.tile(np.arange(sequences, dtype=np.int32), shards)
    turns = []
    for step in range(steps):
        tokens = [[FROM_BUFFER] * sequences] * shards if step else first
        segments = ([Segment(step, [token], pages) for token, pages in zip(of, own, strict=True)] for of in tokens)
        batch, _ = pack([[Segments.of(each, len(shape.tables))] for each in segments], shape, here)
        turns.append(programs.on_devices(StepInput(batch, on_host(places), on_host(np.ones_like(places, bool)), None)))
    return turns
