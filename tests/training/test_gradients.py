"""Every parameter of every family learns."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from blocks import by_name
from test_goldens import FAMILIES, GOLDENS, PREFILL_THEN_DECODE

from moe_jax.checkpoints import Checkpoint
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import Placement, Route, ScatterCombine
from moe_jax.training.examples import examples
from moe_jax.training.loss import losses

SPLIT = [case for case, _ in PREFILL_THEN_DECODE]
"""One for each way to remember: their gradients come through the collectives of a mesh. Those of feed-forward blocks do
so in the tests of every placement."""
LENGTH = 12
"""Tokens of each of four sequences."""


@pytest.mark.usefixtures("no_cache_writes")
@pytest.mark.parametrize("case", FAMILIES)
def test_the_gradient_of_every_parameter_is_finite_and_not_zero(case: str) -> None:
    placement = Placement.parse("data=2,expert=2,tensor=2" if case in SPLIT else "data=1")
    checkpoint = Checkpoint(GOLDENS / case)
    decoder = ShardedDecoder(checkpoint.config, placement, "float32")
    tokens = np.random.default_rng(0).integers(checkpoint.config.vocab_size, size=(4, LENGTH)).tolist()
    given = examples([each[:1] for each in tokens], [each[1:] for each in tokens], placement, LENGTH)
    route = Route.whole(ScatterCombine(placement))
    run = jax.jit(jax.grad(lambda parameters: losses(decoder, parameters, given, route).next_token))
    for name, gradient in by_name(run(checkpoint.load(decoder))).items():
        assert np.isfinite(gradient).all(), name
        # The bias of the choice of experts is no part of what is chosen; trainers balance the load with it.
        assert gradient.any() != name.endswith("router.selection_bias"), name
