"""What the compiled decode step holds: collectives, copies, compile time."""

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
    """A dense layer, then MoE layers with a shared expert."""
    rest = (LayerConfig(ATTENTION, MOE),) * (layers - 1)
    return ModelConfig(100, 32, (LayerConfig(ATTENTION, DenseConfig(32)), *rest), 1e-6, 256)


@cache
def decode_step(
    where: str, combine: type[Combine], layers: int = LAYERS, slots: int = 4, positions: int = 512
) -> jax.stages.Compiled:
    here = placement(where)
    sized = combine.sized(here, [slots] * here.size(Role.TOKENS), slots)
    return Programs(ShardedDecoder(model(layers), here, "float32")).decode_step(slots, positions, Route.whole(sized))


def found(compiled: jax.stages.Compiled) -> list[Collective]:
    return collectives(compiled.as_text() or "")


def in_feed_forwards(compiled: jax.stages.Compiled) -> Counter[str]:
    return count([c for c in found(compiled) if "/ffn/" in c.scope])


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("where", ["dp8_ep8", "two_replicas_dp4_ep4"])
def test_at_tensor_1_a_block_has_one_reduction(where: str) -> None:
    scattered = in_feed_forwards(decode_step(where, ScatterCombine))
    assert scattered["reduce-scatter"] == LAYERS
    assert scattered["all-reduce"] == 0
    reduced = in_feed_forwards(decode_step(where, ReduceCombine))
    assert reduced["all-reduce"] == LAYERS
    assert reduced["reduce-scatter"] == 0


@pytest.mark.usefixtures("fresh_compilation")
def test_at_tensor_1_nothing_else_is_summed() -> None:
    assert count(found(decode_step("dp8_ep8", ScatterCombine)))["all-reduce"] == 0


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("where", ["dp4_ep4_tp2", "dp2_ep4"])
def test_with_attention_tp_a_block_reduce_scatters_and_all_reduces(where: str) -> None:
    blocks = in_feed_forwards(decode_step(where, ScatterCombine))
    assert (blocks["reduce-scatter"], blocks["all-reduce"]) == (LAYERS, LAYERS)
    reduced = in_feed_forwards(decode_step(where, ReduceCombine))
    assert (reduced["reduce-scatter"], reduced["all-reduce"]) == (0, LAYERS)


@pytest.mark.usefixtures("fresh_compilation")
def test_one_device_talks_to_nobody() -> None:
    assert not found(decode_step("single", ReduceCombine))


@pytest.mark.usefixtures("fresh_compilation")
@pytest.mark.parametrize("where", ["dp8_ep8", "dp4_ep4_tp2"])
def test_the_cache_is_updated_in_place(where: str) -> None:
    slots, positions = 4, 512
    memory = decode_step(where, ScatterCombine, LAYERS, slots, positions).memory_analysis()
    assert memory is not None
    kv_heads = max(1, ATTENTION.kv_heads // placement(where).size(Role.HEADS))
    of_layer = 2 * slots * kv_heads * positions * ATTENTION.head_dim * 4
    assert memory.alias_size_in_bytes >= LAYERS * of_layer
    # Attention may look at one layer's keys and values at a time, never at a copy of the cache.
    assert memory.temp_size_in_bytes < 3 * of_layer


@pytest.mark.usefixtures("fresh_compilation")
def test_states_are_updated_in_place() -> None:
    """Of sequences, beside pages: a layer's states are looked at, never a copy of all."""
    delta = DeltaConfig(8, 4, 32, 32, 4, DecayConfig(each_channel=False), HeadGate.SILU)
    here, slots, units = placement("dp8_ep8"), 32, 8
    layers = (LayerConfig(delta, DenseConfig(32)), LayerConfig(ATTENTION, DenseConfig(32))) * units
    decoder = ShardedDecoder(ModelConfig(100, 32, layers, 1e-6, 256), here, "float32")
    memory = Programs(decoder).decode_step(slots, PAGE, Route.whole(ScatterCombine(here))).memory_analysis()
    states = held_bytes(decoder.abstract_caches({None: 0}, PAGE, slots))
    assert memory is not None
    assert memory.alias_size_in_bytes >= states
    assert memory.temp_size_in_bytes < states / 2


@pytest.mark.usefixtures("fresh_compilation")
def test_depth_adds_nothing_to_the_program() -> None:
    """`python -m bench.compile_time` prints what this means in seconds."""
    shallow, deep = (
        len((decode_step("dp8_ep8", ScatterCombine, n).as_text() or "").splitlines()) for n in (LAYERS, 48)
    )
    assert deep <= 1.02 * shallow


@pytest.mark.usefixtures("fresh_compilation")
def test_what_is_read_here_is_what_users_compile() -> None:
    """Tests compile quickly: machine code is less optimized, the program is the same."""
    found = []
    for quickly in (False, True):  # at one place, which the text tells
        jax.config.update("jax_disable_most_optimizations", quickly)
        compiled = decode_step.__wrapped__("dp4_ep4_tp2", ScatterCombine)
        found.append((compiled.as_text(), str(compiled.memory_analysis())))
    assert found[0] == found[1]
