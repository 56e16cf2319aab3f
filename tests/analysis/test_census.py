from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.analysis.census import collectives, count, dot_flops
from moe_jax.sharding import make_mesh

MESH = make_mesh("data=2,expert=4")


def hlo(function: object) -> str:
    mapped = jax.shard_map(function, mesh=MESH, in_specs=P(("data", "expert")), out_specs=P(("data", "expert")))  # type: ignore[arg-type]
    return jax.jit(mapped).lower(jnp.ones((64, 4))).compile().as_text() or ""


def looped(x: jax.Array) -> jax.Array:
    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        with jax.named_scope("inner"):
            return x + lax.all_gather(x, "expert", tiled=True)[:8], None

    x, _ = lax.scan(body, x, None, length=5)
    with jax.named_scope("outer"):
        return lax.pcast(lax.psum(x, "data"), "data", to="varying")


@pytest.mark.usefixtures("fresh_compilation")
def test_collectives_in_loops_count_once_per_trip() -> None:
    found = collectives(hlo(looped))
    assert count(found) == {"all-gather": 5, "all-reduce": 1}
    gather = next(c for c in found if c.kind == "all-gather")
    assert "inner" in gather.scope
    assert gather.result == "f32[32,4]"


@pytest.mark.usefixtures("fresh_compilation")
def test_branches_and_nested_loops() -> None:
    def function(x: jax.Array) -> jax.Array:
        twice = lax.scan(lambda x, _: (looped(x), None), x, None, length=2)[0]
        return lax.cond(lax.psum(x, ("data", "expert")).sum() > 0, lambda: twice, lambda: x)

    assert count(collectives(hlo(function)))["all-gather"] == 10


@pytest.mark.usefixtures("fresh_compilation")
def test_products_in_loops_count_once_per_trip() -> None:
    def function(x: jax.Array) -> jax.Array:
        square = x.T @ x
        return lax.scan(lambda x, _: (jnp.sin(x @ square), None), x, None, length=3)[0]

    assert dot_flops(hlo(function)) == 2 * 8 * 4 * 4 * (1 + 3)


def test_other_text_is_refused() -> None:
    with pytest.raises(AssertionError):
        collectives("no program")


@pytest.mark.parametrize(
    "groups", ["{{0,1,2,3},{4,5,6,7}}", "[2,4]<=[8]", "mesh['data'=2,'expert'=2,'tensor'=2] {'data','tensor'}"]
)
def test_bytes_sent_by_groups_however_they_are_written(groups: str) -> None:
    text = f"""HloModule m
ENTRY %main (p: f32[8,4]) -> f32[2,4] {{
  %a = ((f32[8,4]), f32[2,4]) reduce-scatter-start(%p), replica_groups={groups}, dimensions={{0}}
  %b = f32[2,4] reduce-scatter-done(%a)
  %c = bf16[8,4] all-gather(%b), replica_groups={groups}, dimensions={{0}}
  ROOT %d = f8e4m3fn[8,4] all-reduce(%c), replica_groups={groups}
}}"""
    found = collectives(text)
    assert [(c.kind, c.devices, c.asynchronous) for c in found] == [
        ("reduce-scatter", 4, True),
        ("all-gather", 4, False),
        ("all-reduce", 4, False),
    ]
    assert [c.sent_bytes for c in found] == [3 * 32, 3 / 4 * 64, 2 * 3 / 4 * 32]


def program(body: str, header: str = "") -> str:
    return f"HloModule m{header}\n\nENTRY %main (p: f32[8,4]) -> f32[8,4] {{\n{body}\n}}"


@pytest.mark.parametrize(
    "branches",
    [
        "conditional(%i, %p, %p, %p), branch_computations={%one, %two, %none}",
        "conditional(i, p, p, p), branch_computations={one, two, none}",
        "conditional(%i, %p, %p), true_computation=%one, false_computation=%two",
        "conditional(%i, %p, %p), true_computation=%two, false_computation=%one",
    ],
)
def test_all_branches_of_a_conditional_count(branches: str) -> None:
    text = f"""
%one (q: f32[8,4]) -> f32[8,4] {{
  ROOT %a = f32[8,4] all-reduce(%q), replica_groups={{{{0,1}}}}
}}

%two (r: f32[8,4]) -> f32[8,4] {{
  %b = f32[2,4] reduce-scatter(%r), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
  ROOT %c = f32[8,4] all-gather(%b), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}

%none (s: f32[8,4]) -> f32[8,4] {{
  ROOT %d = f32[8,4] negate(%s)
}}

%body (t: f32[8,4]) -> f32[8,4] {{
  ROOT %e = f32[8,4] {branches}
}}

%end (u: f32[8,4]) -> pred[] {{
  ROOT %f = pred[] constant(false)
}}
"""
    looped = '  ROOT %w = f32[8,4] while(%p), condition=%end, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    assert count(collectives(text + program(looped))) == {"all-reduce": 3, "reduce-scatter": 3, "all-gather": 3}


@pytest.mark.parametrize(
    ("pairs", "devices"),
    [("{0,1},{1,2},{2,3},{3,0}", 4), ("{0,1},{4,5},{1,0},{5,4}", 2), ("{2,3},{0,1},{1,2}", 4), ("{0,0},{1,1}", 1)],
)
def test_a_permutation_sends_its_buffer_once(pairs: str, devices: int) -> None:
    found = collectives(
        program(f"""
  %a = (f32[8,4], f32[8,4], u32[], u32[]) collective-permute-start(%p), source_target_pairs={{{pairs}}}
  %b = f32[8,4] collective-permute-done(%a)
  ROOT %c = f32[8,4] collective-permute(%b), channel_id=2, source_target_pairs={{{pairs}}}""")
    )
    sent = 4 * 32 if devices > 1 else 0
    assert [(c.kind, c.devices, c.sent_bytes, c.asynchronous) for c in found] == [
        ("collective-permute", devices, sent, True),
        ("collective-permute", devices, sent, False),
    ]


@pytest.mark.parametrize(
    ("header", "devices"),
    [
        (", is_scheduled=true, num_partitions=8", 8),
        (", replica_count=2, num_partitions=4", 8),
        (", replica_count=4", 4),
        ("", 1),
    ],
)
def test_no_groups_are_all_devices_of_the_program(header: str, devices: int) -> None:
    body = "  ROOT %a = f32[8,4] all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add"
    (found,) = collectives(program(body, header))
    assert found.devices == devices
    assert found.sent_bytes == 2 * (devices - 1) / devices * 128


@pytest.mark.parametrize(
    ("array", "whole"),
    [("s4[8,4]{1,0:E(4)}", 16), ("u4[3,5]", 7.5), ("f4e2m1fn[8,4]", 16), ("pred[8,4]", 32), ("bf16[8,4]", 64)],
)
def test_numbers_of_less_than_a_byte(array: str, whole: float) -> None:
    (found,) = collectives(program(f"  ROOT %a = {array} all-gather(%p), replica_groups=[2,4]<=[8]"))
    assert found.sent_bytes == 3 / 4 * whole
