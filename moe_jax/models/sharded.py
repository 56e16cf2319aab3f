"""Decoder on a mesh: shardings of parameters and caches, and the wrapper that runs it on each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from moe_jax.config import LayerConfig, ModelConfig, MoEConfig, Quantization, RecurrentConfig
from moe_jax.errors import ConfigError
from moe_jax.kernels.forward_batch import ForwardBatch
from moe_jax.kernels.kv_cache import PagedKVCache, attention_tile_on
from moe_jax.kernels.recurrent_states import STATE_DTYPE, SlotStates
from moe_jax.kernels.step import Step
from moe_jax.layers import parameter
from moe_jax.models.decoder import Caches, Decoder
from moe_jax.models.grouping import Group, group_layers, ungrouped
from moe_jax.sharding import (
    AUTO,
    DEFAULT_GATHER_DTYPE,
    EXACT,
    Encoding,
    Hardware,
    Placement,
    Policy,
    ResidualLayout,
    Role,
    Route,
    RowBytes,
    Strategy,
    as_encoding,
    as_residual_layout,
    as_strategy,
    check_divisibility,
)

Parameters = nnx.State
Tree = TypeVar("Tree")

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ShardedDecoder:
    """Model config on a placement: shardings of parameters and caches, and the mesh's programs. Holds no arrays.

    Raises:
      PlacementError: the model cannot be split this way.
      ConfigError: a dtype that is not one of `DTYPES`.
    """

    config: ModelConfig
    placement: Placement
    dtype: str
    scan_layers: bool = True
    """Compile repeating layers as one loop. Compile time then does not grow with depth, but each step copies every
    layer's weights, except those of experts, out of the stack."""
    quantization: Quantization | None = None
    """Format of the weights held in eight bits; None holds all weights in `dtype`."""

    def __post_init__(self) -> None:
        if str(self.dtype) not in DTYPES:
            raise ConfigError(f"dtype must be bfloat16, float16 or float32, got {str(self.dtype)!r}")
        check_divisibility(self.config, self.placement)

    @property
    def groups(self) -> tuple[Group, ...]:
        return _groups(self.config, self.scan_layers)

    @property
    def _abstract(self) -> tuple[nnx.GraphDef, Parameters]:
        return _abstract(self.config, self.scan_layers, self.dtype)

    def rows_of(self, layer: LayerConfig, encoding: Encoding = EXACT) -> RowBytes:
        """Bytes of one row on its way through a layer's feed-forward block."""
        ffn = layer.ffn
        top_k, shared = (ffn.top_k, ffn.shared is not None) if isinstance(ffn, MoEConfig) else (0, False)
        return RowBytes.of(self.config.hidden, self.dtype, top_k=top_k, shared=shared, encoding=encoding)

    def policy(
        self,
        hardware: Hardware,
        combine: str | Strategy = AUTO,
        residual: str | type[ResidualLayout] = AUTO,
        gather_dtype: str = DEFAULT_GATHER_DTYPE,
    ) -> Policy:
        """Make the policy for a user's choices; `"auto"` leaves a choice to the policy.

        Raises:
          PlacementError, ConfigError: unknown strategy, residual layout or dtype.
        """
        encoding = as_encoding(gather_dtype)
        strategy, layout = as_strategy(combine), as_residual_layout(residual)
        layers = tuple(self.rows_of(layer, encoding) for layer in self.config.layers)
        return Policy(self.placement, layers, hardware, strategy, layout, encoding)

    @property
    def graph(self) -> nnx.GraphDef:
        return self._abstract[0]

    @cached_property
    def parameters(self) -> Parameters:
        """Shapes, dtypes and shardings of all parameters."""
        return parameter.placed(self._abstract[1], self.placement, self.quantization)

    @property
    def parameter_specs(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding.spec, self.parameters)

    def init(self, seed: int) -> Parameters:
        """Make random parameters on the devices that hold them; the values do not depend on the placement."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.parameters)

        def make(key: Array) -> Parameters:
            exact = nnx.state(Decoder(self.config, self.groups, dtype=self.dtype, rngs=nnx.Rngs(params=key)))
            if self.quantization is None:
                return exact
            return parameter.quantized(exact, self.parameters, self.quantization)

        return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))

    def unstacked(self, stacked: Parameters) -> Parameters:
        """Unstack the parameters of a decoder that scans its layers. The stacked arrays are deleted."""
        if self.scan_layers:
            return stacked
        groups = group_layers(self.config.layers)

        def layers() -> Iterator[tuple[Any, nnx.Variable]]:
            for path, param in nnx.to_flat_state(stacked):
                match path:
                    case ("stacks", int(group), "unit", int(index), *rest):
                        stack = param.get_value()
                        for repeat in range(groups[group].repeats):
                            layer = groups[group].layer_index(repeat, index)
                            part = lax.slice_in_dim(stack, repeat, repeat + 1)
                            yield ("stacks", 0, "unit", layer, *rest), param.replace(part)
                        stack.delete()
                    case _:
                        yield path, param

        return nnx.from_flat_state(layers())

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """Distinct attention windows of the layers; layers with equal windows share page tables.

        Recurrent layers have no window; a model of recurrent layers only has the single window None.
        """
        mixers = (layer.attention for layer in self.config.layers)
        windows = (mixer.window for mixer in mixers if not isinstance(mixer, RecurrentConfig))
        return tuple(dict.fromkeys(windows)) or (None,)

    def abstract_caches(self, pages: Mapping[int | None, int], page: int, slots: int) -> Caches:
        """Shapes, dtypes and shardings of the caches.

        Args:
          pages: number of pages on each token shard, for each of the `windows`.
          page: positions of a page.
          slots: sequences with recurrent states on each token shard.
        """
        placement, shards = self.placement, self.placement.size(Role.TOKENS)

        def abstract(repeats: int, heads: int, places: int, *rest: int, dtype: DTypeLike = self.dtype) -> Any:
            shape = (repeats, max(heads, placement.size(Role.HEADS)), shards * places, *rest)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(placement.mesh, self.cache_spec))

        def cache(repeats: int, layer: LayerConfig) -> PagedKVCache | SlotStates:
            attention = layer.attention
            if isinstance(attention, RecurrentConfig):
                recent = (abstract(repeats, heads, slots, *rest) for heads, *rest in attention.conv_state_shapes)
                heads, *rest = attention.state_shape
                return SlotStates(tuple(recent), abstract(repeats, heads, slots, *rest, dtype=STATE_DTYPE))
            pool = (repeats, attention.kv_heads, pages[attention.window], page)
            keys, values = (abstract(*pool, width) for width in attention.cached_widths)
            return PagedKVCache(keys, values, attention_tile_on(placement.device))

        return [[cache(group.repeats, layer) for layer in group.unit] for group in self.groups]

    def empty_caches(self, pages: Mapping[int | None, int], page: int, slots: int) -> Caches:
        """Allocate zeroed caches, with the arguments of `abstract_caches`."""
        return zeros(self.abstract_caches(pages, page, slots))

    def per_device(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Wrap `function(decoder, *args)` in `shard_map`. The wrapped function takes `(parameters, *args)`."""

        def run(parameters: Parameters, *args: Any) -> Any:
            return function(nnx.merge(self.graph, parameters), *args)

        specs = (self.parameter_specs, *in_specs)
        return jax.shard_map(run, mesh=self.placement.mesh, in_specs=specs, out_specs=out_specs, check_vma=True)

    def batch_specs(self, batch: ForwardBatch) -> ForwardBatch:
        """Specs of a batch: arrays of rows and segments are split over the token shards, counts are replicated."""
        return batch.labelled(self.rows_spec, PartitionSpec())

    @property
    def rows_spec(self) -> PartitionSpec:
        return self.placement.spec((Role.TOKENS,), (0,))

    @property
    def cache_spec(self) -> PartitionSpec:
        """Spec of every cache array: layers, heads, then pages or slots; later dimensions are whole."""
        return PartitionSpec(None, *self.placement.spec((Role.HEADS, Role.TOKENS), (0, 0)))

    def all_logits(
        self, parameters: Parameters, caches: Caches, batch: ForwardBatch, route: Route
    ) -> tuple[Float[Array, "shards*T vocab"], Caches]:
        """Return the logits after every row, and the caches with the batch written."""

        def run(decoder: Decoder, caches: Caches, batch: ForwardBatch) -> tuple[Array, Caches]:
            x, caches, _ = decoder(batch.tokens, Step.of(batch, route), caches)
            with jax.named_scope("head"):
                return decoder.vocabulary.all_logits(x, route.residual), caches

        in_specs, out_specs = (self.cache_spec, self.batch_specs(batch)), (self.rows_spec, self.cache_spec)
        return self.per_device(run, in_specs, out_specs)(parameters, caches, batch)


@cache
def _groups(config: ModelConfig, scan_layers: bool) -> tuple[Group, ...]:
    return (group_layers if scan_layers else ungrouped)(config.layers)


@cache
def _abstract(config: ModelConfig, scan_layers: bool, dtype: str) -> tuple[nnx.GraphDef, Parameters]:
    """Trace the decoder's parameters once for all placements."""
    groups = _groups(config, scan_layers)
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, groups, dtype=dtype, rngs=parameter.ShapesAlone(0))))


def zeros(abstract: Tree) -> Tree:
    """Allocate zeros of the given shapes, dtypes and shardings, in one program."""
    leaves, structure = jax.tree.flatten(abstract)
    return jax.tree.unflatten(structure, _zeros_program(tuple(leaves))())


@cache
def _zeros_program(arrays: tuple[jax.ShapeDtypeStruct, ...]) -> Callable[[], tuple[Array, ...]]:
    def make() -> tuple[Array, ...]:
        return tuple(jnp.zeros(array.shape, array.dtype) for array in arrays)

    return jax.jit(make, out_shardings=tuple(array.sharding for array in arrays))
