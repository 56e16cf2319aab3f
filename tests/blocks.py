"""One feed-forward block on a placement, run as a user with a model of their own would."""

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
    """A module `(x, rows, combine) -> (y, load)` with the same random parameters on every placement."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], placement: Placement) -> None:
        self.placement = placement
        self.graph, parameters = _created(make)
        placed = parameter.placed(parameters, placement)
        self.specs = jax.tree.map(lambda leaf: leaf.sharding.spec, placed)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
        self.parameters = jax.device_put(parameters, shardings)

    @property
    def shards(self) -> int:
        return self.placement.size(Role.TOKENS)

    def program(self, combine: Combine) -> Callable[[Any, jax.Array, Rows], jax.Array]:
        """Return a function `(parameters, x, rows) -> y` of the rows of all shards, one shard after the other."""
        tokens = self.placement.spec((Role.TOKENS,), (0,))

        def run(parameters: Any, x: jax.Array, rows: Rows) -> jax.Array:
            return nnx.merge(self.graph, parameters)(x, rows, combine)[0]

        in_specs = (self.specs, tokens, PartitionSpec())
        return jax.shard_map(run, mesh=self.placement.mesh, in_specs=in_specs, out_specs=tokens)

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Parameters as NumPy arrays, by name."""
        return by_name(self.parameters)


@cache
def _created(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(make(nnx.Rngs(0)))


def by_name(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def altered(state: nnx.State, name: str, change: Callable[[jax.Array], jax.Array]) -> nnx.State:
    """Replace one parameter."""
    flat = nnx.to_flat_state(state)
    assert name in {".".join(map(str, path)) for path, _ in flat}
    changed = [
        (path, leaf.replace(change(leaf.get_value())) if ".".join(map(str, path)) == name else leaf)
        for path, leaf in flat
    ]
    return nnx.from_flat_state(changed)


def spread(real: np.ndarray, counts: list[int], capacity: int, fill: float = 0.0) -> jnp.ndarray:
    """Lay real rows out for shards that hold `counts` of them, and fill pad rows with `fill`."""
    out = np.full((len(counts), capacity, real.shape[1]), fill, np.float32)
    first = 0
    for shard, count in enumerate(counts):
        out[shard, :count] = real[first : first + count]
        first += count
    return jnp.asarray(out.reshape(-1, real.shape[1]))


def collect(rows: np.ndarray, counts: list[int], capacity: int) -> np.ndarray:
    """Invert `spread`: return the real rows, in order."""
    shards = np.asarray(rows).reshape(len(counts), capacity, -1)
    return np.concatenate([shard[:count] for shard, count in zip(shards, counts, strict=True)])
