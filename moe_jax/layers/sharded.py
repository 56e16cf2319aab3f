"""Layers in your own model: partition specs of parameters, and feed-forward layers as functions of whole arrays.

N  rows of all token shards together     T  rows of one token shard     D  hidden
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moe_jax.errors import PlacementError
from moe_jax.sharding import Combine, Placement, Role, Rows, ScatterCombine, as_placement
from moe_jax.sharding.collectives import sum_devices


class FeedForward(Protocol):
    """A layer for one device of a placement: `MoE`, `DenseMLP`, or a module of your own with this call."""

    def __call__(self, x: Float[Array, "T D"], rows: Rows, combine: Combine) -> tuple[Float[Array, "T D"], Any]: ...


def specs(module: nnx.Module | nnx.State, placement: Placement) -> nnx.State:
    """Return the partition specs of all variables, in a state like the module's.

    They are the `in_specs` of a `jax.shard_map` over the module's state:

        graph, state = nnx.split(layer)
        run = lambda state, x: nnx.merge(graph, state)(x, rows, combine)
        jax.jit(jax.shard_map(run, mesh=placement.mesh, in_specs=(specs(state, placement), x_spec), out_specs=y_specs))

    The specs are those of `nnx.get_partition_spec` under `nnx.logical_axis_rules(placement.rules)`, except that KV
    heads are replicated where there are fewer of them than heads devices. Other modules' variables keep their specs.

    Raises:
      PlacementError: a dimension does not divide over the devices that split it.
    """
    state = module if isinstance(module, nnx.State) else nnx.state(module)
    specs_by_path = [
        (path, variable.replace(_spec(path, variable, placement))) for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(specs_by_path)


def on_mesh(
    layer: FeedForward, placement: str | Placement, combine: Combine | None = None
) -> Callable[..., tuple[Float[Array, "... D"], Any]]:
    """Turn a layer into a differentiable function of whole arrays: `y, load = on_mesh(layer, placement)(x)`.

    `x` is `[..., D]`: its leading dimensions, flattened, are N rows, which the token shards share evenly. `y` has the
    shape of `x`. `load` is the sum over the token shards; `None` for layers without a router. Pass `Rows` as a second
    argument where some rows are padding.

    Args:
      placement: a `Placement`, or its text as in `"expert=4,tensor=2"`.
      combine: how rows move between devices, by default `ScatterCombine(placement)`.

    Raises:
      PlacementError: N or a dimension of a parameter does not divide over the devices, or `combine` is for another
        placement.
    """
    placement = as_placement(placement)
    combine = combine or ScatterCombine(placement)
    if combine.placement != placement:
        raise PlacementError(f"combine is made for the placement {combine.placement}: make it for {placement}")

    def run(x: Float[Array, "... D"], rows: Rows | None = None) -> tuple[Float[Array, "... D"], Any]:
        flat = x.reshape(-1, x.shape[-1])
        rows = rows or Rows.full(_capacity(flat.shape[0], placement))
        y, load = _run_on_mesh(combine, *nnx.split(layer), flat, rows)
        return y.reshape(x.shape), load

    return run


@partial(jax.jit, static_argnums=(0, 1))
def _run_on_mesh(
    combine: Combine, graph: nnx.GraphDef, state: nnx.State, x: Float[Array, "N D"], rows: Rows
) -> tuple[Float[Array, "N D"], Any]:
    placement = combine.placement
    replicated, tokens = PartitionSpec(), placement.spec((Role.TOKENS,), (0,))

    def on_device(state: nnx.State, x: Float[Array, "T D"], rows: Rows) -> tuple[Float[Array, "T D"], Any]:
        y, load = nnx.merge(graph, state)(x, rows, combine)
        return y, sum_devices(load, placement.axes(Role.TOKENS))

    in_specs, out_specs = (specs(state, placement), tokens, replicated), (tokens, replicated)
    sharded = jax.shard_map(on_device, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)
    return sharded(state, x, rows)


def _spec(path: tuple[Any, ...], variable: nnx.Variable, placement: Placement) -> PartitionSpec:
    names = variable.get_metadata().get("out_sharding")
    if not isinstance(names, tuple) or not set(names) <= {None, *Role}:
        return nnx.get_partition_spec(variable).get_value()
    spec = placement.spec(names, variable.shape)
    for dim, (name, axes, size) in enumerate(zip(names, spec, variable.shape, strict=True)):
        if axes and size % placement.size(Role(name)):
            raise PlacementError(
                f"dimension {dim} of {'.'.join(map(str, path))} is {size}, which does not divide over "
                f"{placement.describe(Role(name))}: choose a mesh whose axes divide it"
            )
    return spec


def _capacity(rows: int, placement: Placement) -> int:
    if rows % placement.size(Role.TOKENS):
        raise PlacementError(
            f"{rows} rows do not divide over {placement.describe(Role.TOKENS)}: pad them, and say with "
            "`Rows.of(counts, placement, capacity)` as a second argument how many of each shard are real"
        )
    return rows // placement.size(Role.TOKENS)
