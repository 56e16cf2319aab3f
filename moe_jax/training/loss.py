"""Next-token loss and router balance, computed where the rows are.

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
from moe_jax.training.examples import NOT_A_TARGET, Examples


class Losses(NamedTuple):
    next_token: Float[Array, ""]
    """Mean negative log-likelihood of the targets, in nats."""
    balance: Float[Array, ""]
    """Mean over MoE layers of E times the sum over experts of (share of assignments) x (mean score): 1 when even, E
    when one expert takes all (Fedus et al., arXiv:2101.03961, equation 4)."""


def losses(decoder: ShardedDecoder, parameters: Parameters, examples: Examples, route: Route) -> Losses:
    """The losses of the examples, the same on every device.

    Raises:
      ConfigError: rows that are gathered in less precision, for rounding has no gradient.
    """
    if route.combine.encoding != EXACT:
        raise ConfigError("losses need rows that are gathered exactly: rounding has no gradient")
    batch = examples.batch
    caches: Caches = [
        [Stateless() if isinstance(layer.attention, RecurrentConfig) else Uncached() for layer in group.unit]
        for group in decoder.groups
    ]
    axes, kept = (here.axes(Role.TOKENS) for here in (decoder.placement, route.residual.ffn_placement))

    def run(model: Decoder, batch: ForwardBatch, targets: Array) -> Losses:
        step = Step.of(batch, route)
        x, _, loads = model(batch.tokens, step, caches)
        logits = model.vocabulary.all_logits(x, route.residual)
        wanted = targets != NOT_A_TARGET
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(wanted, targets, 0))
        total, count = jnp.sum(jnp.where(wanted, nats, 0)), jnp.sum(wanted)
        balances = [_balance(sum_devices(load, kept)) for load in loads]
        return Losses(
            sum_devices(total, axes) / sum_devices(count, axes),
            jnp.mean(jnp.concatenate(balances)) if balances else jnp.ones(()),
        )

    in_specs = (decoder.batch_specs(batch), decoder.rows_spec)
    return decoder.per_device(run, in_specs, PartitionSpec())(parameters, batch, examples.targets)


def _balance(load: Load) -> Float[Array, "L"]:
    """Of stacked layers, from the loads of all rows."""
    chosen = load.assignments / jnp.sum(load.assignments, axis=-1, keepdims=True)
    scores = load.probabilities / jnp.sum(load.probabilities, axis=-1, keepdims=True)
    return chosen.shape[-1] * jnp.sum(jax.lax.stop_gradient(chosen) * scores, axis=-1)
