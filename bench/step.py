"""Compiled decode steps, and programs with the collectives of their feed-forward blocks alone.

T  rows of a token shard, one per slot     N  gathered rows     D  hidden size     W  words of a `SampledTokens` row
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
from bench.timing import Program, Times, traffic
from moe_jax.analysis.census import Collective, collectives
from moe_jax.config import LayerConfig, MoEConfig
from moe_jax.kernels.forward_batch import QueryLayout
from moe_jax.models import BatchShape, PageRange, Parameters, Segment, Segments, ShardedDecoder, pack
from moe_jax.programs import FROM_BUFFER, PAGE, PackedBuffer, Programs, SampledTokens, StepInput
from moe_jax.sharding import Combine, Role, Route, Rows
from moe_jax.sharding.rows import on_host

SCOPES = ("attention", "ffn", "route", "gather", "experts", "combine", "head", "sample")


class DecodeProgram:
    """Greedy decoding from empty caches; each call runs one step."""

    def __init__(
        self,
        decoder: ShardedDecoder,
        parameters: Parameters,
        inputs: list[PackedBuffer],
        rows: Rows,
        positions: int,
        combine: Combine,
    ) -> None:
        """
        Args:
          inputs: Input of each step (`step_inputs`).
        """
        programs, segments = Programs(decoder), rows.capacity
        self.compiled = programs.decode_step(segments, positions, Route.whole(combine))
        self.collectives = collectives(self.compiled.as_text() or "")
        self.collectives_alone = gather_and_combine(decoder, rows, combine)
        self._outputs: list[Int32[Array, "shards*T W"]] = []
        self._parameters, self._inputs = parameters, inputs
        pages = dict.fromkeys(decoder.windows, segments * -(-positions // PAGE))
        self._caches = decoder.empty_caches(pages, PAGE, segments)
        self._slots = programs.empty_slots(segments, positions)

    def __call__(self) -> Int32[Array, "shards*T W"]:
        """Run the next step; return the packed `SampledTokens`."""
        step_input = self._inputs[len(self._outputs)]
        emitted, _, self._slots, self._caches = self.compiled(self._parameters, self._caches, self._slots, step_input)
        self._outputs.append(emitted)
        return emitted

    @property
    def tokens(self) -> Int32[Array, "steps shards*T"]:
        """Sampled tokens of every step so far."""
        return on_host(
            np.array([SampledTokens.unpack(np.asarray(emitted), top=0).tokens[:, 0] for emitted in self._outputs])
        )

    @property
    def has_same_collectives(self) -> bool:
        """True if the feed-forward blocks of a step have collectives, and `collectives_alone` has the same ones."""
        blocks = [c for c in self.collectives if _in_block(c)]
        return bool(blocks) and traffic(blocks) == traffic(self.collectives_alone.collectives)

    @property
    def scopes(self) -> set[str]:
        """Members of `SCOPES` that the compiled program, and so its trace, contains."""
        names = re.findall(r'op_name="([^"]*)"', self.compiled.as_text() or "")
        return {scope for name in names for scope in name.split("/")[:-1]} & set(SCOPES)

    def profile(self, step: Times, alone: Times | None) -> dict[str, Any]:
        """Results of the step, from its time and the time of `collectives_alone`."""
        compute = step.median - alone.median if alone else 0.0
        return {
            **traffic(self.collectives),
            "outside": sum(c.times for c in self.collectives if not _in_block(c)),
            "collective": alone.as_dict() if alone else None,
            "collective_to_compute": alone.median / compute if alone and compute > 0 else None,
            "step": step.as_dict(),
            "tokens_per_second": self.tokens[0].size / step.median,
        }


def _in_block(collective: Collective) -> bool:
    """True if the collective belongs to a feed-forward block."""
    return "ffn" in collective.scope.split("/")


def gather_and_combine(decoder: ShardedDecoder, rows: Rows, combine: Combine) -> Program:
    """Compile the gathers and combines of a step's feed-forward blocks, in the same loops, with little else."""
    placement, config = decoder.placement, decoder.config
    tokens, parts = decoder.rows_spec, placement.spec((Role.PARTIAL,), (0,))

    def block(x: Float[Array, "T D"], offset: Float[Array, "1"], rows: Rows, layer: LayerConfig) -> Float[Array, "T D"]:
        top_k = layer.ffn.top_k if isinstance(layer.ffn, MoEConfig) else 0
        routing = [x[:, :top_k].astype(dtype) for dtype in (jnp.int32, jnp.float32)] if top_k else []

        def part(x: Float[Array, "N D"], *routing: Array) -> Float[Array, "N D"]:
            return (x + offset + sum(map(jnp.sum, routing))).astype(x.dtype)

        return exchange(combine, rows, x, *routing, part=part)

    def run(x: Float[Array, "T D"], offset: Float[Array, "1"], rows: Rows) -> Float[Array, "T D"]:
        for group in decoder.groups:

            def unit(x: Array, _: None, layers: tuple[LayerConfig, ...] = group.unit) -> tuple[Array, None]:
                for layer in layers:
                    x = block(x, offset, rows, layer)
                return x, None

            x, _ = lax.scan(unit, x, length=group.repeats)
        return x

    mapped = jax.shard_map(run, mesh=placement.mesh, in_specs=(tokens, parts, placement.spec((), ())), out_specs=tokens)
    shape = (placement.size(Role.TOKENS) * rows.capacity, config.hidden)
    x = jnp.zeros(shape, decoder.dtype, device=NamedSharding(placement.mesh, tokens))
    offset = jnp.zeros(placement.size(Role.PARTIAL), decoder.dtype, device=NamedSharding(placement.mesh, parts))
    return Program.of(mapped, x, offset, rows)


def step_inputs(decoder: ShardedDecoder, sequences: int, positions: int, steps: int) -> list[PackedBuffer]:
    """Input of each step, on the devices: random tokens at first, then the tokens that the step before sampled."""
    placement, random, pages_each = decoder.placement, np.random.default_rng(0), -(-positions // PAGE)
    shards, programs = placement.size(Role.TOKENS), Programs(decoder)
    shape = BatchShape(
        (QueryLayout(sequences, 1),), sequences, tuple((window, pages_each) for window in decoder.windows)
    )
    pages = [
        [PageRange(0, array("i", range(index * pages_each, (index + 1) * pages_each)))] * len(decoder.windows)
        for index in range(sequences)
    ]
    first = random.integers(decoder.config.vocab_size, size=(shards, sequences)).tolist()
    slots = np.tile(np.arange(sequences, dtype=np.int32), shards)
    inputs = []
    for step in range(steps):
        tokens = [[FROM_BUFFER] * sequences] * shards if step else first
        segments = [[Segment(step, [token], own) for token, own in zip(row, pages, strict=True)] for row in tokens]
        batch, _ = pack([[Segments.of(each, len(shape.tables))] for each in segments], shape, placement)
        samples = on_host(np.ones_like(slots, bool))
        inputs.append(programs.on_devices(StepInput(batch, on_host(slots), samples, None)))
    return inputs
