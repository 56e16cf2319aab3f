"""Regression tests for bugs that other engines have shipped. Each test was seen to fail with its bug planted here.

Numbers without a project are issues and pull requests of sgl-project/sglang.

    23729                   test_a_block_is_reduced_once_in_a_model
    23431, 23734            layers/test_every_placement.py::test_blocks_equal_those_of_one_device
    24785                   test_a_dense_first_layer_is_reduced_once_when_rows_are_packed
    37187                   test_every_family_has_a_golden
    27189, 36879            sharding/test_collectives.py::test_mistakes_are_errors_while_tracing
    tpu-inference 3435      test_shared_experts_are_reduced_over_all_axes_with_dp_and_tp_attention
    32663, 23713            programs/test_programs.py::test_with_attention_tp_a_block_reduce_scatters_and_all_reduces
    40643                   test_a_shard_does_not_mask_rows_of_other_shards_by_its_own_count
    31838                   test_experts_compute_each_choice_of_a_real_row_once_and_no_pad_rows
    26133                   sharding/test_encoding.py::test_rows_are_independent
    28487                   test_nan_in_pad_rows_reaches_no_real_row_and_no_cache,
                            layers/test_blocks.py::test_nan_in_pad_rows_changes_no_bit_and_pad_rows_come_out_zero
    39899, 6088             test_idle_shards_and_idle_steps_run
    37933, uccl 940, vllm 51984, TensorRT-LLM 16745
                            test_shards_run_one_program_for_all_counts,
                            test_an_idle_shard_takes_part_in_every_collective
    35876                   test_padding_does_not_shift_sequences_against_their_rows
    vllm 45683              test_a_row_is_bitwise_independent_of_its_neighbours
    jax-llm-examples        test_no_row_is_dropped_when_all_rows_choose_experts_of_one_device
    5557, vllm 46428        test_pad_rows_of_idle_shards_are_not_computed,
                            test_decode_steps_are_not_padded_to_a_prefill,
                            sharding/test_policy.py::test_few_bytes_are_sent_if_bytes_decide
    miles 2012, 6872, 16080 test_bench.py::test_schedule

Bugs that cannot occur here:

    32962                   Experts have no replicas that a device could choose from. The whole model may have replicas:
                            the test for 31838 checks that only one of them computes a row.
    12052                   Each token shard keeps the logits of its own rows, so no gather of logits needs counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import decoders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_goldens
from blocks import Block, altered, by_name, collect, spread
from flax import nnx
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.stages import Wrapped
from placements import placement
from recorder import recorded
from reference import moe

from moe_jax.checkpoints.families import FAMILIES
from moe_jax.config import DenseConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, OutputQueue
from moe_jax.kernels.routed_experts import Assignments, dispatch
from moe_jax.layers import DenseMLP, MoE
from moe_jax.scheduler import Request
from moe_jax.sharding import (
    AllToAllCombine,
    Combine,
    Policy,
    RaggedCombine,
    ReduceCombine,
    RowBytes,
    Rows,
    ScatterCombine,
    as_hardware,
)

STRATEGIES = (ScatterCombine, ReduceCombine, RaggedCombine, AllToAllCombine)
HIDDEN, CAPACITY = 16, 4
CONFIG = MoEConfig(experts=8, top_k=2, width=16, router=RouterConfig(norm=1), shared=SharedExpertConfig(16, gated=True))
ROW = RowBytes(gather=8192, combine=8192, metadata=16, top_k=2)


@cache
def block(placement_name: str) -> Block:
    return Block(make_moe, placement(placement_name))


def make_moe(rngs: nnx.Rngs) -> MoE:
    return MoE(CONFIG, HIDDEN, dtype=jnp.float32, rngs=rngs)


def make_dense(rngs: nnx.Rngs) -> DenseMLP:
    return DenseMLP(DenseConfig(128), HIDDEN, dtype=jnp.float32, rngs=rngs)


@cache
def program(placement_name: str, strategy: type[Combine]) -> Wrapped:
    return jax.jit(block(placement_name).program(combine_for_any_counts(placement_name, strategy)))


def combine_for_any_counts(placement_name: str, strategy: type[Combine]) -> Combine:
    shards = decoders.token_shards(placement_name)
    if strategy is RaggedCombine:
        return RaggedCombine(placement(placement_name), base=1, overflow=shards * CAPACITY)
    return strategy.sized(placement(placement_name), [CAPACITY] * shards, CAPACITY)


def random_rows(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, HIDDEN)).astype(np.float32)


def assert_equals_reference(
    placement_name: str, strategy: type[Combine], counts: list[int], parameters: nnx.State, x: np.ndarray
) -> None:
    rows = Rows.of(counts, placement(placement_name), CAPACITY)
    got = program(placement_name, strategy)(parameters, spread(x, counts, CAPACITY), rows)
    expected = np.asarray(moe(jnp.asarray(x), by_name(parameters), CONFIG))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(collect(np.asarray(got), counts, CAPACITY), expected, rtol=0, atol=1e-5)


def test_the_table_lists_every_test() -> None:
    this_file = Path(__file__)
    listed = re.findall(r"(?:([\w/]+\.py)::)?(test_\w+)(?!\w|\.py)", __doc__ or "")
    for path, name in listed:
        assert f"def {name}(" in (this_file.parent / path if path else this_file).read_text(), f"{path}::{name}"
    names = re.findall(r"^def (test_\w+)", this_file.read_text(), re.MULTILINE)
    assert {name for path, name in listed if not path} == set(names) - {"test_the_table_lists_every_test"}


@pytest.mark.parametrize("placement_name", ["dp8_ep8", "dp4_ep4_tp2", "dp2_ep4"])
def test_a_block_is_reduced_once_in_a_model(placement_name: str) -> None:
    """The model all-reduced, and a wrapper reduce-scattered again: fluent text, log-probabilities a nat off."""
    decoders.assert_equals_single_device(
        placement_name, ScatterCombine, decoders.PROMPTS, decoders.seats_on_outer_shards(placement_name)
    )


@pytest.mark.parametrize(
    ("placement_name", "strategy"),
    [("dp4_ep4_tp2", ReduceCombine), ("dp4_ep4_tp2", RaggedCombine), ("dp8_ep8", ReduceCombine)],
)
def test_a_dense_first_layer_is_reduced_once_when_rows_are_packed(placement_name: str, strategy: type[Combine]) -> None:
    """MoE layers skipped the sum that later code does for packed rows; the dense first layer was summed twice."""
    assert isinstance(decoders.MODEL.layers[0].ffn, DenseConfig)
    decoders.assert_equals_single_device(
        placement_name, strategy, decoders.PROMPTS, decoders.seats_on_outer_shards(placement_name)
    )


def test_every_family_has_a_golden() -> None:
    """A family was added without a comparison months after the bug was fixed in the others."""
    cases = [test_goldens.GOLDENS / case / "config.json" for case in test_goldens.MAIN_CASES]
    assert {json.loads(path.read_text())["model_type"] for path in cases} == set(FAMILIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("placement_name", ["dp4_ep4_tp2", "dp2_ep4"])
def test_shared_experts_are_reduced_over_all_axes_with_dp_and_tp_attention(
    placement_name: str, strategy: type[Combine]
) -> None:
    """Routed experts were summed over all axes, shared experts over those of attention only: accuracy 24%, not 96%."""
    counts = [CAPACITY, 1, 0, 3][: decoders.token_shards(placement_name)]
    only_shared = altered(block(placement_name).parameters, "experts.down", jnp.zeros_like)
    assert_equals_reference(placement_name, strategy, counts, only_shared, random_rows(sum(counts)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_shard_does_not_mask_rows_of_other_shards_by_its_own_count(strategy: type[Combine]) -> None:
    """A shard masked the gathered rows by its own count, and so dropped rows of other shards."""
    for few in range(4):
        counts = [1 if shard == few else CAPACITY for shard in range(4)]
        assert_equals_reference(
            "dp4_ep4_tp2", strategy, counts, block("dp4_ep4_tp2").parameters, random_rows(1 + 3 * CAPACITY)
        )


@pytest.mark.parametrize(
    ("placement_name", "strategy"),
    [
        ("dp8_ep8", ScatterCombine),
        ("dp8_ep8", ReduceCombine),
        ("two_replicas_dp4_ep4", ScatterCombine),
        ("two_replicas_dp4_ep4", RaggedCombine),
    ],
)
def test_experts_compute_each_choice_of_a_real_row_once_and_no_pad_rows(
    placement_name: str, strategy: type[Combine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pad rows were routed and filled the experts; replicas of an expert each computed, and added, the same row."""
    computed: list[int] = []
    expert_loop = dispatch.expert_loop

    def spy(mlp: Any, backend: Any, inputs: Any, assignments: Assignments, *weights: Any) -> jax.Array:
        jax.debug.callback(lambda sizes: computed.append(int(sizes.sum())), assignments.sizes)
        return expert_loop(mlp, backend, inputs, assignments, *weights)

    monkeypatch.setattr(dispatch, "expert_loop", spy)
    moe_block, counts = block(placement_name), [CAPACITY, 1, 0, 3, 0, 0, 2, 1]
    x = spread(random_rows(sum(counts)), counts, CAPACITY, fill=np.nan)
    run = jax.jit(moe_block.program(combine_for_any_counts(placement_name, strategy)))
    run(moe_block.parameters, x, Rows.of(counts, moe_block.placement, CAPACITY)).block_until_ready()
    jax.effects_barrier()
    assert sum(computed) == CONFIG.top_k * sum(counts)


@pytest.mark.parametrize(
    ("placement_name", "strategy"),
    [("dp8_ep8", ScatterCombine), ("dp4_ep4_tp2", RaggedCombine), ("dp8_ep8", ReduceCombine)],
)
def test_nan_in_pad_rows_reaches_no_real_row_and_no_cache(placement_name: str, strategy: type[Combine]) -> None:
    """Pad rows were never written and held NaN, which the residual carried to real rows."""
    seats = decoders.seats_on_outer_shards(placement_name)
    nan = altered(
        decoders.parameters(placement_name), "embedding.table", lambda table: table.at[decoders.PAD_TOKEN].set(np.nan)
    )
    clean, clean_caches = decoders.run(placement_name, strategy, decoders.PROMPTS, seats)
    got, caches = decoders.run(placement_name, strategy, decoders.PROMPTS, seats, nan)
    jax.tree.map(np.testing.assert_array_equal, (got, caches), (clean, clean_caches))


@pytest.mark.parametrize(
    ("placement_name", "strategy"),
    [("dp8_ep8", ScatterCombine), ("dp4_ep4_tp2", RaggedCombine), ("dp8_ep8", ReduceCombine)],
)
def test_idle_shards_and_idle_steps_run(placement_name: str, strategy: type[Combine]) -> None:
    """The model indexed the first row of a shard without rows."""
    decoders.assert_equals_single_device(placement_name, strategy, decoders.PROMPTS[:1], [decoders.Seat(1, 1)])
    decoders.program(placement_name, strategy)(*decoders.arguments(placement_name, {}))[0].block_until_ready()
    idle, moe_block = [0] * decoders.token_shards(placement_name), block(placement_name)
    smallest = moe_block.program(strategy.sized(moe_block.placement, idle, 1))
    jax.eval_shape(smallest, moe_block.parameters, random_rows(len(idle)), Rows.of(idle, moe_block.placement))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_run_one_program_for_all_counts(strategy: type[Combine]) -> None:
    """Shards chose their collective by their own counts, and deadlocked."""
    moe_block = block("dp4_ep4_tp2")
    x = jnp.zeros((4 * CAPACITY, HIDDEN))
    rows = [Rows.of(c, moe_block.placement, CAPACITY) for c in ([CAPACITY] * 4, [0] * 4, [0, 1, CAPACITY, 0])]
    texts = {program("dp4_ep4_tp2", strategy).lower(moe_block.parameters, x, each).as_text() for each in rows}
    assert len(texts) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_idle_shard_takes_part_in_every_collective(strategy: type[Combine]) -> None:
    """A shard without rows skipped a block, and the other shards waited in the block's collective."""
    traced = decoders.program("dp4_ep4_tp2", strategy).trace(*decoders.arguments("dp4_ep4_tp2", {}))
    collectives = [(name, inside) for name, inside in equations(traced.jaxpr.jaxpr) if COLLECTIVE.search(name)]
    assert len(collectives) > 2 * len(decoders.LAYERS)
    assert not [name for name, inside in collectives if {"cond", "while"} & set(inside)]


COLLECTIVE = re.compile("psum|reduce_scatter|all_gather|all_to_all|ppermute")


def equations(jaxpr: Jaxpr, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name of each primitive, and the names of the primitives whose bodies contain it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside
        for body in jaxprs_in_params(equation.params):
            yield from equations(body, (*inside, equation.primitive.name))


@pytest.mark.parametrize("strategy", [ScatterCombine, RaggedCombine])
def test_padding_does_not_shift_sequences_against_their_rows(strategy: type[Combine]) -> None:
    """Rows were padded to an alignment but the sequences' offsets were not: attention read rows of neighbours."""
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        prompts = [decoders.PROMPTS[number] for number in order]
        decoders.assert_equals_single_device(
            "dp4_ep4_tp2",
            strategy,
            prompts,
            [decoders.Seat(*at) for at in ((2, 1), (2, 0), (3, 0), (3, 1))],
        )


@pytest.mark.parametrize(
    ("strategy", "before"),
    [(ScatterCombine, 0), (ScatterCombine, 1), (ReduceCombine, 0), (ReduceCombine, 1), (RaggedCombine, 0)],
)
def test_a_row_is_bitwise_independent_of_its_neighbours(strategy: type[Combine], before: int) -> None:
    """A reduction over the actual number of rows added in an order that depended on the neighbours.

    With a sequence before it, a row also moves within its shard. `RaggedCombine` promises nothing then: it sums the
    base rows over one axis after the other, and the overflow rows over all axes at once.
    """
    seats = [decoders.Seat(3, 0), decoders.Seat(3, 1), decoders.Seat(0, 0), decoders.Seat(1, 1)]
    logits = []
    for neighbours in ([[2, 4, 6], [1], [7] * 8], [[50], [51, 52, 53, 54, 55], [6]], [[9, 9], [1], [2, 3, 4]]):
        prompts = [*neighbours[:before], decoders.PROMPTS[0], *neighbours[before:]]
        logits.append(decoders.run("dp4_ep4_tp2", strategy, prompts, seats)[0][before])
    for other in logits[1:]:
        np.testing.assert_array_equal(other, logits[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_row_is_dropped_when_all_rows_choose_experts_of_one_device(strategy: type[Combine]) -> None:
    """Buffers held twice the even share of a device; rows beyond it were dropped silently."""
    placement_name, counts = "dp4_ep4_tp2", [CAPACITY] * 4
    x = random_rows(4 * CAPACITY)
    x[:, 0] = 4
    router = np.zeros((HIDDEN, CONFIG.experts), np.float32)
    router[0, 4:6] = 1, 2
    skewed = altered(block(placement_name).parameters, "router.weight", lambda _: jnp.asarray(router))
    assert_equals_reference(placement_name, strategy, counts, skewed, x)


def test_pad_rows_of_idle_shards_are_not_computed() -> None:
    """Idle shards were padded to the prefill of another shard, and all devices computed the pad rows."""
    dense, rows = Block(make_dense, placement("dp8_ep8")), 512

    def flops(counts: Sequence[int]) -> float:
        capacity = max(counts)
        policy = Policy(dense.placement, (replace(ROW, top_k=0),), as_hardware("h100"))
        combine = policy.decide(counts, capacity).route.combine
        x = jax.ShapeDtypeStruct((8 * capacity, HIDDEN), jnp.float32)
        run = jax.jit(dense.program(combine))
        cost = run.lower(dense.parameters, x, Rows.of(counts, dense.placement, capacity)).cost_analysis()
        assert cost is not None
        return cost["flops"]

    even = flops([rows // 8] * 8)
    assert flops([rows] + [0] * 7) < 1.2 * even
    assert flops([0] * 7 + [rows]) < 1.2 * even


def test_decode_steps_are_not_padded_to_a_prefill() -> None:
    """Decode steps shared buffers with the prefill of another shard, and took as long."""
    engine, recorder = recorded(positions=64, slots=4, pages=16)
    greedy = SamplingParams(temperature=0)
    for number, prompt in enumerate([[1] * 12, *[[1]] * 7]):
        engine.add(Generation(Request(number, prompt, 4), greedy, 0, frozenset(), None, OutputQueue()))
    while engine.has_work:
        engine.step()
    assert engine.stats.generated_tokens == 4 * 8
    assert recorder.capacities == [4 + 32, 1]  # four segments for decoding requests, besides the prompts
