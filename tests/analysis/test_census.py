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


@pytest.mark.usefixtures("anew")
def test_collectives_in_loops_count_once_per_trip() -> None:
    found = collectives(hlo(looped))
    assert count(found) == {"all-gather": 5, "all-reduce": 1}
    gather = next(c for c in found if c.kind == "all-gather")
    assert "inner" in gather.scope
    assert gather.result == "f32[32,4]"


@pytest.mark.usefixtures("anew")
def test_branches_and_nested_loops() -> None:
    def function(x: jax.Array) -> jax.Array:
        twice = lax.scan(lambda x, _: (looped(x), None), x, None, length=2)[0]
        return lax.cond(lax.psum(x, ("data", "expert")).sum() > 0, lambda: twice, lambda: x)

    assert count(collectives(hlo(function)))["all-gather"] == 10


@pytest.mark.usefixtures("anew")
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
