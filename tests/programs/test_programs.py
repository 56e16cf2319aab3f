"""Compiled decode steps: collectives, memory and size of the program."""

from __future__ import annotations

from collections import Counter
from functools import cache

import jax
import pytest
from placements import placement

from moe_jax.analysis.census import Collective, collectives, count
from moe_jax.analysis.roofline import held_bytes
from moe_jax.config import (
    AttentionConfig,
    DecayConfig,
    DeltaConfig,
    DenseConfig,
    HeadGate,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RopeConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE, Programs
from moe_jax.sharding import Combine, ReduceCombine, Role, Route, ScatterCombine

ATTENTION = AttentionConfig(heads=8, kv_heads=2, head_dim=8, rope=RopeConfig(1e4), qk_norm=QKNorm.HEAD)
MOE = MoEConfig(experts=8, top_k=2, width=16, router=RouterConfig(norm=1), shared=SharedExpertConfig(16, gated=True))
LAYERS = 8


def model(layers: int) -> ModelConfig:
    """Make a model of a dense layer, then MoE layers with a shared expert."""
    moe_layers = (LayerConfig(ATTENTION, MOE),) * (layers - 1)
    return ModelConfig(100, 32, (LayerConfig(ATTENTION, DenseConfig(32)), *moe_layers), 1e-6, 256)


@cache
def decode_step(
    placement_name: str, combine: type[Combine], layers: int = LAYERS, slots: int = 4, positions: int = 512
) -> jax.stages.Compiled:
    where = placement(placement_name)
    sized = combine.sized(where, [slots] * where.size(Role.TOKENS), slots)
    return Programs(ShardedDecoder(model(layers), where, "float32")).decode_step(slots, positions, Route.whole(sized))


def all_collectives(compiled: jax.stages.Compiled) -> list[Collective]:
    return collectives(compiled.as_text() or "")


def feed_forward_collectives(compiled: jax.stages.Compiled) -> Counter[str]:
    return count([c for c in all_collectives(compiled) if "/ffn/" in c.scope])


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("placement_name", ["dp8_ep8", "two_replicas_dp4_ep4"])
def test_without_tp_a_block_has_one_reduction(placement_name: str) -> None:
    scattered = feed_forward_collectives(decode_step(placement_name, ScatterCombine))
    assert scattered["reduce-scatter"] == LAYERS
    assert scattered["all-reduce"] == 0
    reduced = feed_forward_collectives(decode_step(placement_name, ReduceCombine))
    assert reduced["all-reduce"] == LAYERS
    assert reduced["reduce-scatter"] == 0


@pytest.mark.usefixtures("fresh_compilation")
def test_without_tp_nothing_else_is_reduced() -> None:
    assert count(all_collectives(decode_step("dp8_ep8", ScatterCombine)))["all-reduce"] == 0


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("placement_name", ["dp4_ep4_tp2", "dp2_ep4"])
def test_with_attention_tp_a_block_reduce_scatters_and_all_reduces(placement_name: str) -> None:
    blocks = feed_forward_collectives(decode_step(placement_name, ScatterCombine))
    assert (blocks["reduce-scatter"], blocks["all-reduce"]) == (LAYERS, LAYERS)
    reduced = feed_forward_collectives(decode_step(placement_name, ReduceCombine))
    assert (reduced["reduce-scatter"], reduced["all-reduce"]) == (0, LAYERS)


@pytest.mark.usefixtures("fresh_compilation")
def test_one_device_has_no_collectives() -> None:
    assert not all_collectives(decode_step("single", ReduceCombine))


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("placement_name", ["dp8_ep8", "dp4_ep4_tp2"])
def test_the_kv_cache_is_updated_in_place(placement_name: str) -> None:
    slots, positions = 4, 512
    memory = decode_step(placement_name, ScatterCombine, LAYERS, slots, positions).memory_analysis()
    assert memory is not None
    kv_heads = max(1, ATTENTION.kv_heads // placement(placement_name).size(Role.HEADS))
    layer_bytes = 2 * slots * kv_heads * positions * ATTENTION.head_dim * 4
    assert memory.alias_size_in_bytes >= LAYERS * layer_bytes
    # Attention may copy the keys and values of one layer, but not of the whole cache.
    assert memory.temp_size_in_bytes < 3 * layer_bytes


@pytest.mark.usefixtures("fresh_compilation")
def test_recurrent_states_are_updated_in_place() -> None:
    """A step may copy the states of one layer, but not of all layers."""
    delta = DeltaConfig(8, 4, 32, 32, 4, DecayConfig(each_channel=False), HeadGate.SILU)
    where, slots, units = placement("dp8_ep8"), 32, 8
    layers = (LayerConfig(delta, DenseConfig(32)), LayerConfig(ATTENTION, DenseConfig(32))) * units
    decoder = ShardedDecoder(ModelConfig(100, 32, layers, 1e-6, 256), where, "float32")
    memory = Programs(decoder).decode_step(slots, PAGE, Route.whole(ScatterCombine(where))).memory_analysis()
    states = held_bytes(decoder.abstract_caches({None: 0}, PAGE, slots))
    assert memory is not None
    assert memory.alias_size_in_bytes >= states
    assert memory.temp_size_in_bytes < states / 2


@pytest.mark.usefixtures("fresh_compilation")
def test_program_size_does_not_grow_with_depth() -> None:
    """`python -m bench.compile_time` prints the compile time in seconds."""
    shallow, deep = (
        len((decode_step("dp8_ep8", ScatterCombine, n).as_text() or "").splitlines()) for n in (LAYERS, 48)
    )
    assert deep <= 1.02 * shallow


@pytest.mark.usefixtures("fresh_compilation")
def test_disabled_optimizations_change_neither_the_text_nor_the_memory() -> None:
    """Tests disable optimizations, so the programs that they read must be those that users compile."""
    programs = []
    for disabled in (False, True):  # one call site, since the text contains its line number
        jax.config.update("jax_disable_most_optimizations", disabled)
        compiled = decode_step.__wrapped__("dp4_ep4_tp2", ScatterCombine)
        programs.append((compiled.as_text(), str(compiled.memory_analysis())))
    assert programs[0] == programs[1]
