"""Runs one feed-forward block on a placement, as someone who brings their own model would."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.layers import parameter
from moe_jax.sharding import Combine, Placement, Role, Rows


class Block:
    """A module `(x, rows, combine) -> (y, load)`, its parameters drawn alike for every placement."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], placement: Placement) -> None:
        self.placement = placement
        self.graph, drawn = _made(make)
        placed = parameter.placed(drawn, placement)
        self.specs = jax.tree.map(lambda leaf: leaf.sharding.spec, placed)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        self.parameters = jax.device_put(drawn, shardings)

    @property
    def shards(self) -> int:
        return self.placement.size(Role.TOKENS)

    def program(self, combine: Combine) -> Callable[[Any, jax.Array, Rows], jax.Array]:
        """`(parameters, x, rows) -> y`, with all shards' rows one after the other."""
        tokens = self.placement.spec((Role.TOKENS,), (0,))

        def run(parameters: Any, x: jax.Array, rows: Rows) -> jax.Array:
            return nnx.merge(self.graph, parameters)(x, rows, combine)[0]

        in_specs = (self.specs, tokens, PartitionSpec())
        return jax.shard_map(run, mesh=self.placement.mesh, in_specs=in_specs, out_specs=tokens)

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The parameters as plain arrays, by name."""
        return by_name(self.parameters)


@cache
def _made(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(make(nnx.Rngs(0)))


def by_name(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def altered(state: nnx.State, name: str, change: Callable[[jax.Array], jax.Array]) -> nnx.State:
    """The same parameters but for one."""
    flat = nnx.to_flat_state(state)
    assert name in {".".join(map(str, path)) for path, _ in flat}
    changed = [
        (path, leaf.replace(change(leaf.get_value())) if ".".join(map(str, path)) == name else leaf)
        for path, leaf in flat
    ]
    return nnx.from_flat_state(changed)


def spread(real: np.ndarray, counts: list[int], capacity: int, fill: float = 0.0) -> jnp.ndarray:
    """Rows laid out for shards of `counts` real rows, pad rows filled with `fill`."""
    out = np.full((len(counts), capacity, real.shape[1]), fill, np.float32)
    first = 0
    for shard, count in enumerate(counts):
        out[shard, :count] = real[first : first + count]
        first += count
    return jnp.asarray(out.reshape(-1, real.shape[1]))


def collect(laid_out: np.ndarray, counts: list[int], capacity: int) -> np.ndarray:
    """The real rows of `spread`'s layout, in order."""
    shards = np.asarray(laid_out).reshape(len(counts), capacity, -1)
    return np.concatenate([rows[:count] for rows, count in zip(shards, counts, strict=True)])
