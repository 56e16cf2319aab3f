"""Bugs that engines of this kind have shipped, each held by a test that was seen to fail with the bug planted here.

Numbers are of issues and pull requests of sgl-project/sglang where no other project is named.

    23729                   test_a_block_is_summed_once_on_its_way_through_the_model
    23431, 23734            layers/test_every_placement.py::test_blocks_equal_those_of_one_device
    24785                   test_a_dense_first_layer_is_reduced_once_when_rows_are_packed
    37187                   test_every_family_is_compared_on_many_placements
    27189, 36879            sharding/test_collectives.py::test_mistakes_are_errors_while_tracing
    tpu-inference 3435      test_a_shared_expert_is_whole_when_attention_is_both_dp_and_tp
    32663, 23713            programs/test_programs.py::test_with_attention_tp_a_block_scatters_and_then_sums_own_rows
    40643                   test_no_shard_masks_its_peers_rows_by_its_own_count
    31838                   test_experts_compute_each_choice_of_a_real_row_once_and_nothing_for_pad_rows
    26133                   sharding/test_encoding.py::test_rows_are_independent
    28487                   test_nan_in_pad_rows_reaches_no_real_row_and_no_cache,
                            layers/test_blocks.py::test_nan_in_pad_rows_changes_no_bit_and_pad_rows_come_out_zero
    39899, 6088             test_idle_shards_and_idle_steps_run
    37933, uccl 940, vllm 51984, TensorRT-LLM 16745
                            test_shards_run_one_program_whatever_their_counts,
                            test_an_idle_shard_takes_part_in_every_collective
    35876                   test_padding_moves_no_sequence_away_from_its_rows
    vllm 45683              test_a_row_keeps_its_bits_when_its_neighbours_change
    jax-llm-examples        test_no_choice_is_dropped_when_all_rows_want_the_experts_of_one_device
    5557, vllm 46428        test_pad_rows_of_idle_shards_are_not_computed,
                            test_decode_steps_are_not_padded_to_a_prefill,
                            sharding/test_policy.py::test_few_bytes_are_sent_if_bytes_decide
    miles 2012, 6872, 16080 test_bench.py::test_schedule

These cannot be shipped by what is not here:

    32962                   An expert has no replicas among which devices could choose. Copies of the whole model there
                            may be: the test for 31838 holds that one of them computes a row.
    12052                   Logits stay with the token shard that owns their rows: no gather of them needs counts.
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
def block(where: str) -> Block:
    return Block(make_moe, placement(where))


def make_moe(rngs: nnx.Rngs) -> MoE:
    return MoE(CONFIG, HIDDEN, dtype=jnp.float32, rngs=rngs)


def make_dense(rngs: nnx.Rngs) -> DenseMLP:
    return DenseMLP(DenseConfig(128), HIDDEN, dtype=jnp.float32, rngs=rngs)


@cache
def program(where: str, strategy: type[Combine]) -> Wrapped:
    return jax.jit(block(where).program(for_any_counts(where, strategy)))


def for_any_counts(where: str, strategy: type[Combine]) -> Combine:
    shards = decoders.token_shards(where)
    if strategy is RaggedCombine:
        return RaggedCombine(placement(where), base=1, overflow=shards * CAPACITY)
    return strategy.sized(placement(where), [CAPACITY] * shards, CAPACITY)


def drawn(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, HIDDEN)).astype(np.float32)


def assert_equals_reference(
    where: str, strategy: type[Combine], counts: list[int], parameters: nnx.State, x: np.ndarray
) -> None:
    rows = Rows.of(counts, placement(where), CAPACITY)
    got = program(where, strategy)(parameters, spread(x, counts, CAPACITY), rows)
    expected = np.asarray(moe(jnp.asarray(x), by_name(parameters), CONFIG))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(collect(np.asarray(got), counts, CAPACITY), expected, rtol=0, atol=1e-5)


def test_every_bug_has_its_test() -> None:
    here = Path(__file__)
    listed = re.findall(r"(?:([\w/]+\.py)::)?(test_\w+)(?!\w|\.py)", __doc__ or "")
    for path, name in listed:
        assert f"def {name}(" in (here.parent / path if path else here).read_text(), f"{path}::{name}"
    names = re.findall(r"^def (test_\w+)", here.read_text(), re.MULTILINE)
    assert {name for path, name in listed if not path} == set(names) - {"test_every_bug_has_its_test"}


@pytest.mark.parametrize("where", ["dp8_ep8", "dp4_ep4_tp2", "dp2_ep4"])
def test_a_block_is_summed_once_on_its_way_through_the_model(where: str) -> None:
    """An all-reduce in the model, then a reduce-scatter around it: fluent text, log-probabilities a nat off."""
    decoders.assert_as_alone(where, ScatterCombine, decoders.PROMPTS, decoders.ends(where))


@pytest.mark.parametrize(
    ("where", "strategy"),
    [("dp4_ep4_tp2", ReduceCombine), ("dp4_ep4_tp2", RaggedCombine), ("dp8_ep8", ReduceCombine)],
)
def test_a_dense_first_layer_is_reduced_once_when_rows_are_packed(where: str, strategy: type[Combine]) -> None:
    """The MoE layers knew that packed rows were summed elsewhere, the one dense layer before them did not."""
    assert isinstance(decoders.MODEL.layers[0].ffn, DenseConfig)
    decoders.assert_as_alone(where, strategy, decoders.PROMPTS, decoders.ends(where))


def test_every_family_is_compared_on_many_placements() -> None:
    """One more family came months after the others were mended, and nobody had compared it."""
    cases = [test_goldens.GOLDENS / case / "config.json" for case in test_goldens.MAIN_CASES]
    assert {json.loads(path.read_text())["model_type"] for path in cases} == set(FAMILIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["dp4_ep4_tp2", "dp2_ep4"])
def test_a_shared_expert_is_whole_when_attention_is_both_dp_and_tp(where: str, strategy: type[Combine]) -> None:
    """Routed experts were summed over all axes, the shared one over those of attention only: 24% for 96%."""
    counts = [CAPACITY, 1, 0, 3][: decoders.token_shards(where)]
    only_shared = altered(block(where).parameters, "experts.down", jnp.zeros_like)
    assert_equals_reference(where, strategy, counts, only_shared, drawn(sum(counts)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_shard_masks_its_peers_rows_by_its_own_count(strategy: type[Combine]) -> None:
    """The buffer of all shards was masked by the count of one: a shard with few rows dropped those of its peers."""
    for few in range(4):
        counts = [1 if shard == few else CAPACITY for shard in range(4)]
        assert_equals_reference(
            "dp4_ep4_tp2", strategy, counts, block("dp4_ep4_tp2").parameters, drawn(1 + 3 * CAPACITY)
        )


@pytest.mark.parametrize(
    ("where", "strategy"),
    [
        ("dp8_ep8", ScatterCombine),
        ("dp8_ep8", ReduceCombine),
        ("two_replicas_dp4_ep4", ScatterCombine),
        ("two_replicas_dp4_ep4", RaggedCombine),
    ],
)
def test_experts_compute_each_choice_of_a_real_row_once_and_nothing_for_pad_rows(
    where: str, strategy: type[Combine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pad rows were routed and filled the experts; and copies of an expert each computed, and added, the same row."""
    computed: list[int] = []
    expert_loop = dispatch.expert_loop

    def spy(mlp: Any, backend: Any, inputs: Any, assignments: Assignments, *weights: Any) -> jax.Array:
        jax.debug.callback(lambda sizes: computed.append(int(sizes.sum())), assignments.sizes)
        return expert_loop(mlp, backend, inputs, assignments, *weights)

    monkeypatch.setattr(dispatch, "expert_loop", spy)
    made, counts = block(where), [CAPACITY, 1, 0, 3, 0, 0, 2, 1]
    x = spread(drawn(sum(counts)), counts, CAPACITY, fill=np.nan)
    run = jax.jit(made.program(for_any_counts(where, strategy)))
    run(made.parameters, x, Rows.of(counts, made.placement, CAPACITY)).block_until_ready()
    jax.effects_barrier()
    assert sum(computed) == CONFIG.top_k * sum(counts)


@pytest.mark.parametrize(
    ("where", "strategy"), [("dp8_ep8", ScatterCombine), ("dp4_ep4_tp2", RaggedCombine), ("dp8_ep8", ReduceCombine)]
)
def test_nan_in_pad_rows_reaches_no_real_row_and_no_cache(where: str, strategy: type[Combine]) -> None:
    """Pad rows were never written, so NaN stood there; the residual carried it to where real rows were read."""
    seats = decoders.ends(where)
    nan = altered(decoders.parameters(where), "embedding.table", lambda table: table.at[decoders.PAD_TOKEN].set(np.nan))
    clean, clean_caches = decoders.run(where, strategy, decoders.PROMPTS, seats)
    got, caches = decoders.run(where, strategy, decoders.PROMPTS, seats, nan)
    jax.tree.map(np.testing.assert_array_equal, (got, caches), (clean, clean_caches))


@pytest.mark.parametrize(
    ("where", "strategy"), [("dp8_ep8", ScatterCombine), ("dp4_ep4_tp2", RaggedCombine), ("dp8_ep8", ReduceCombine)]
)
def test_idle_shards_and_idle_steps_run(where: str, strategy: type[Combine]) -> None:
    """Code of the model indexed the first row of a shard that had none."""
    decoders.assert_as_alone(where, strategy, decoders.PROMPTS[:1], [decoders.Seat(1, 1)])
    decoders.program(where, strategy)(*decoders.arguments(where, {}))[0].block_until_ready()
    idle, made = [0] * decoders.token_shards(where), block(where)
    smallest = made.program(strategy.sized(made.placement, idle, 1))
    jax.eval_shape(smallest, made.parameters, drawn(len(idle)), Rows.of(idle, made.placement))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_run_one_program_whatever_their_counts(strategy: type[Combine]) -> None:
    """Shards chose their collective by their own counts, and waited for each other for ever."""
    made = block("dp4_ep4_tp2")
    x = jnp.zeros((4 * CAPACITY, HIDDEN))
    texts = {
        program("dp4_ep4_tp2", strategy).lower(made.parameters, x, Rows.of(c, made.placement, CAPACITY)).as_text()
        for c in ([CAPACITY] * 4, [0] * 4, [0, 1, CAPACITY, 0])
    }
    assert len(texts) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_idle_shard_takes_part_in_every_collective(strategy: type[Combine]) -> None:
    """A shard without rows skipped a block, and its peers waited in the block's collective."""
    traced = decoders.program("dp4_ep4_tp2", strategy).trace(*decoders.arguments("dp4_ep4_tp2", {}))
    found = [(name, inside) for name, inside in equations(traced.jaxpr.jaxpr) if COLLECTIVE.search(name)]
    assert len(found) > 2 * len(decoders.LAYERS)
    assert not [name for name, inside in found if {"cond", "while"} & set(inside)]


COLLECTIVE = re.compile("psum|reduce_scatter|all_gather|all_to_all|ppermute")


def equations(jaxpr: Jaxpr, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each primitive, and those whose bodies it stands in."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, inside
        for body in jaxprs_in_params(equation.params):
            yield from equations(body, (*inside, equation.primitive.name))


@pytest.mark.parametrize("strategy", [ScatterCombine, RaggedCombine])
def test_padding_moves_no_sequence_away_from_its_rows(strategy: type[Combine]) -> None:
    """Rows were padded to an alignment, the sequences' offsets in them were not: attention read its neighbours."""
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        prompts = [decoders.PROMPTS[number] for number in order]
        decoders.assert_as_alone(
            "dp4_ep4_tp2",
            strategy,
            prompts,
            [decoders.Seat(*at) for at in ((2, 1), (2, 0), (3, 0), (3, 1))],
        )


@pytest.mark.parametrize(
    ("strategy", "before"),
    [(ScatterCombine, 0), (ScatterCombine, 1), (ReduceCombine, 0), (ReduceCombine, 1), (RaggedCombine, 0)],
)
def test_a_row_keeps_its_bits_when_its_neighbours_change(strategy: type[Combine], before: int) -> None:
    """A reduction of as many rows as there were added them up in an order that the neighbours decided.

    With a sequence before its own, a row also moves within its shard. `RaggedCombine` promises nothing then: it adds up
    the base over one axis after the other, what is above it over all at once.
    """
    seats = [decoders.Seat(3, 0), decoders.Seat(3, 1), decoders.Seat(0, 0), decoders.Seat(1, 1)]
    found = []
    for neighbours in ([[2, 4, 6], [1], [7] * 8], [[50], [51, 52, 53, 54, 55], [6]], [[9, 9], [1], [2, 3, 4]]):
        prompts = [*neighbours[:before], decoders.PROMPTS[0], *neighbours[before:]]
        found.append(decoders.run("dp4_ep4_tp2", strategy, prompts, seats)[0][before])
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_choice_is_dropped_when_all_rows_want_the_experts_of_one_device(strategy: type[Combine]) -> None:
    """Buffers held twice the fair share of a device; what was routed there beyond it was dropped without a word."""
    where, counts = "dp4_ep4_tp2", [CAPACITY] * 4
    x = drawn(4 * CAPACITY)
    x[:, 0] = 4
    wanted = np.zeros((HIDDEN, CONFIG.experts), np.float32)
    wanted[0, 4:6] = 1, 2
    skewed = altered(block(where).parameters, "router.weight", lambda _: jnp.asarray(wanted))
    assert_equals_reference(where, strategy, counts, skewed, x)


def test_pad_rows_of_idle_shards_are_not_computed() -> None:
    """Idle shards were padded to the prefill of a peer, and the others computed their pad rows."""
    made, rows = Block(make_dense, placement("dp8_ep8")), 512

    def flops(counts: Sequence[int]) -> float:
        capacity = max(counts)
        policy = Policy(made.placement, (replace(ROW, top_k=0),), as_hardware("h100"))
        chosen = policy.decide(counts, capacity).route.combine
        x = jax.ShapeDtypeStruct((8 * capacity, HIDDEN), jnp.float32)
        run = jax.jit(made.program(chosen))
        cost = run.lower(made.parameters, x, Rows.of(counts, made.placement, capacity)).cost_analysis()
        assert cost is not None
        return cost["flops"]

    even = flops([rows // 8] * 8)
    assert flops([rows] + [0] * 7) < 1.2 * even
    assert flops([0] * 7 + [rows]) < 1.2 * even


def test_decode_steps_are_not_padded_to_a_prefill() -> None:
    """Decode steps that shared their buffers with a peer's prefill took as long as it did."""
    engine, recorder = recorded(positions=64, slots=4, pages=16)
    greedy = SamplingParams(temperature=0)
    for number, prompt in enumerate([[1] * 12, *[[1]] * 7]):
        engine.add(Generation(Request(number, prompt, 4), greedy, 0, frozenset(), None, OutputQueue()))
    while engine.has_work:
        engine.step()
    assert engine.stats.generated_tokens == 4 * 8
    assert recorder.capacities == [4 + 32, 1]  # four lines that could decode beside the prompts
