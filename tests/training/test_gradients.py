"""Every parameter of every family learns."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from blocks import by_name
from test_goldens import FAMILIES, GOLDENS

from moe_jax.checkpoints import Checkpoint
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import Placement, Route, ScatterCombine
from moe_jax.training.examples import examples
from moe_jax.training.loss import losses

PLACEMENT = Placement.parse("data=2,expert=2,tensor=2")
LENGTH = 12
"""Tokens of each of four sequences."""


@pytest.mark.usefixtures("unkept")
@pytest.mark.parametrize("case", FAMILIES)
def test_the_gradient_of_every_parameter_is_finite_and_not_zero(case: str) -> None:
    checkpoint = Checkpoint(GOLDENS / case)
    decoder = ShardedDecoder(checkpoint.config, PLACEMENT, "float32")
    tokens = np.random.default_rng(0).integers(checkpoint.config.vocab_size, size=(4, LENGTH)).tolist()
    given = examples([each[:1] for each in tokens], [each[1:] for each in tokens], PLACEMENT, LENGTH)
    route = Route.whole(ScatterCombine(PLACEMENT))
    run = jax.jit(jax.grad(lambda parameters: losses(decoder, parameters, given, route).next_token))
    for name, gradient in by_name(run(checkpoint.load(decoder))).items():
        assert np.isfinite(gradient).all(), name
        # The bias of the choice of experts is no part of what is chosen; trainers balance the load with it.
        assert gradient.any() != name.endswith("router.selection_bias"), name
