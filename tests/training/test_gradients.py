"""Every parameter of every family gets a gradient."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from blocks import by_name
from test_goldens import FAMILIES, GOLDENS, PREFILL_THEN_DECODE

from moe_jax.checkpoints import Checkpoint
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import Placement, Route, ScatterCombine
from moe_jax.training.examples import make_examples
from moe_jax.training.loss import losses

SHARDED = [case for case, _ in PREFILL_THEN_DECODE]
"""One family for each kind of attention or recurrence, differentiated through the collectives of a mesh. The tests of
every placement do so for feed-forward blocks."""
SEQUENCES, LENGTH = 4, 12


@pytest.mark.usefixtures("no_cache_writes")
@pytest.mark.parametrize("case", FAMILIES)
def test_the_gradient_of_every_parameter_is_finite_and_not_zero(case: str) -> None:
    placement = Placement.parse("data=2,expert=2,tensor=2" if case in SHARDED else "data=1")
    checkpoint = Checkpoint(GOLDENS / case)
    decoder = ShardedDecoder(checkpoint.config, placement, "float32")
    tokens = np.random.default_rng(0).integers(checkpoint.config.vocab_size, size=(SEQUENCES, LENGTH)).tolist()
    examples = make_examples([each[:1] for each in tokens], [each[1:] for each in tokens], placement, LENGTH)
    route = Route.whole(ScatterCombine(placement))
    run = jax.jit(jax.grad(lambda parameters: losses(decoder, parameters, examples, route).next_token))
    for name, gradient in by_name(run(checkpoint.load(decoder))).items():
        assert np.isfinite(gradient).all(), name
        # The selection bias only affects which experts are chosen; trainers update it to balance the load.
        assert gradient.any() != name.endswith("router.selection_bias"), name
