"""Next-token loss and load-balancing loss, computed on the devices that hold the rows.

T  rows of a token shard     E  experts     L  MoE layers
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from moe_jax.config import RecurrentConfig
from moe_jax.errors import ConfigError
from moe_jax.kernels.forward_batch import ForwardBatch
from moe_jax.kernels.kv_cache import Uncached
from moe_jax.kernels.recurrent_states import Stateless
from moe_jax.kernels.step import Step
from moe_jax.layers import Load
from moe_jax.models import Caches, Decoder, Parameters, ShardedDecoder
from moe_jax.sharding import EXACT, Role, Route
from moe_jax.sharding.collectives import sum_devices
from moe_jax.training.examples import IGNORE_INDEX, Examples


class Losses(NamedTuple):
    """Losses of a batch."""

    next_token: Float[Array, ""]
    """Mean negative log-likelihood of the targets, in nats."""
    balance: Float[Array, ""]
    """Load-balancing loss, mean over MoE layers (Fedus et al., arXiv:2101.03961, equation 4): E times the sum over
    experts of (share of assignments) x (mean score). 1 for an even load, E when one expert takes all rows."""


def losses(decoder: ShardedDecoder, parameters: Parameters, examples: Examples, route: Route) -> Losses:
    """Losses of a batch, the same on every device.

    Raises:
      ConfigError: The route sends rows in a lower precision; rounding has no gradient.
    """
    if route.combine.encoding != EXACT:
        raise ConfigError(
            f"losses need rows that are gathered exactly, got {route.combine.encoding}: rounding has no gradient; "
            "use gather_dtype='exact'"
        )
    batch = examples.batch
    caches: Caches = [
        [Stateless() if isinstance(layer.attention, RecurrentConfig) else Uncached() for layer in group.unit]
        for group in decoder.groups
    ]
    token_axes = decoder.placement.axes(Role.TOKENS)
    row_axes = route.residual.ffn_placement.axes(Role.TOKENS)

    def run(model: Decoder, batch: ForwardBatch, targets: Array) -> Losses:
        step = Step.of(batch, route)
        x, _, loads = model(batch.tokens, step, caches)
        logits = model.vocabulary.all_logits(x, route.residual)
        has_loss = targets != IGNORE_INDEX
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(has_loss, targets, 0))
        total, count = jnp.sum(jnp.where(has_loss, nats, 0)), jnp.sum(has_loss)
        balances = [_balance(sum_devices(load, row_axes)) for load in loads]
        return Losses(
            sum_devices(total, token_axes) / sum_devices(count, token_axes),
            jnp.mean(jnp.concatenate(balances)) if balances else jnp.ones(()),
        )

    in_specs = (decoder.batch_specs(batch), decoder.rows_spec)
    return decoder.per_device(run, in_specs, PartitionSpec())(parameters, batch, examples.targets)


def _balance(load: Load) -> Float[Array, "L"]:
    """Load-balancing loss of stacked layers, from the loads of all rows."""
    assignments = load.assignments / jnp.sum(load.assignments, axis=-1, keepdims=True)
    scores = load.probabilities / jnp.sum(load.probabilities, axis=-1, keepdims=True)
    return assignments.shape[-1] * jnp.sum(jax.lax.stop_gradient(assignments) * scores, axis=-1)
