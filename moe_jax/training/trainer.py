"""Training loop of a sharded decoder with optax, with orbax checkpoints to resume from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32
from tqdm import tqdm

from moe_jax.errors import ConfigError
from moe_jax.kernels.quantized import NO_GRADIENT
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.sharding import Route
from moe_jax.training.examples import Examples
from moe_jax.training.loss import Losses, losses


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainingState:
    """Everything that a training run saves."""

    step: Int32[Array, ""]
    parameters: Parameters
    optimizer: optax.OptState


@dataclass(frozen=True)
class Trainer:
    """Training loop of a decoder.

    A killed run resumes from its newest saved state, with the examples that an uninterrupted run would use.

    Raises:
      ConfigError: The decoder has quantized weights.
    """

    decoder: ShardedDecoder
    optimizer: optax.GradientTransformation
    examples: Callable[[int], Examples]
    """Examples of a step, from the step number."""
    route: Route
    balance_weight: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decoder.quantization is not None:
            raise ConfigError(NO_GRADIENT)

    def run(self, directory: Path, steps: int, *, save_every: int = 200, progress: bool = False) -> TrainingState:
        """Train until `steps` steps are done, those of earlier runs included; save states in `directory`."""
        from moe_jax.checkpoints.orbax_store import TrainingCheckpoints  # orbax takes half a second to import

        with TrainingCheckpoints(directory) as checkpoints:
            state = checkpoints.restore_newest(self.abstract_state()) or self.initial_state()
            first, update = int(state.step), jax.jit(self.update, donate_argnums=0)
            with tqdm(total=steps, initial=first, desc="training", unit=" steps", disable=not progress) as bar:
                for step in range(first, steps):
                    state, found = update(state, self.examples(step))
                    if (step + 1) % save_every == 0 or step + 1 == steps:
                        checkpoints.save(step + 1, state)
                    bar.update()
                    bar.set_postfix(loss=f"{float(found.next_token):.4f}", balance=f"{float(found.balance):.2f}")
        return state

    def initial_state(self) -> TrainingState:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        parameters = self.decoder.init(self.seed)
        return TrainingState(
            jnp.zeros((), jnp.int32, device=shardings.step),
            parameters,
            jax.jit(self.optimizer.init, out_shardings=shardings.optimizer)(parameters),
        )

    def abstract_state(self) -> TrainingState:
        """Shapes, dtypes and shardings of the state; the moments of the optimizer are sharded as their parameters."""
        parameters = self.decoder.parameters
        replicated = NamedSharding(self.decoder.placement.mesh, PartitionSpec())
        optimizer = optax.tree_utils.tree_map_params(
            self.optimizer,
            lambda _, parameter: parameter,
            jax.eval_shape(self.optimizer.init, parameters),
            parameters,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        )
        return TrainingState(jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated), parameters, optimizer)  # type: ignore[arg-type]

    def update(self, state: TrainingState, examples: Examples) -> tuple[TrainingState, Losses]:
        """Run one optimizer step; `run` compiles this function."""

        def objective(parameters: Parameters) -> tuple[Array, Losses]:
            found = losses(self.decoder, parameters, examples, self.route)
            return found.next_token + self.balance_weight * found.balance, found

        gradients, found = jax.grad(objective, has_aux=True)(state.parameters)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.parameters)
        return TrainingState(
            state.step + 1, cast(Parameters, optax.apply_updates(state.parameters, updates)), optimizer
        ), found
