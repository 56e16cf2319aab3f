"""Training: loss, load balance, resumption, and the split of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoints.orbax_store import TrainingCheckpoints
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.layers import Load
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import (
    AllToAllCombine,
    Combine,
    Placement,
    ReduceCombine,
    Role,
    Route,
    ScatterCombine,
    SplitResidual,
    as_encoding,
)
from moe_jax.training.addition import CHARACTERS, END, Problem, problems, tokenizer
from moe_jax.training.examples import Examples, assign_to_shards, make_examples
from moe_jax.training.loss import _balance, losses
from moe_jax.training.recipe import MAX_LENGTH, Recipe, train
from moe_jax.training.trainer import TrainingState

TINY = Recipe(digits=2, batch_size=16, steps=4, warmup_steps=1)
PLACEMENT = Placement.parse("data=2,expert=2,tensor=2")
OTHER_PLACEMENT = Placement.parse("expert=4")
SCATTER = Route.whole(ScatterCombine(PLACEMENT))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_numbers_of_sequences_on_shards_differ_by_one_at_most(lengths: list[int], shards: int) -> None:
    assigned = assign_to_shards(lengths, shards)
    assert sorted(index for shard in assigned for index in shard) == list(range(len(lengths)))
    counts = list(map(len, assigned))
    assert max(counts) - min(counts) <= 1


def test_long_sequences_go_to_different_shards() -> None:
    first, second = assign_to_shards([100, 1, 100, 1], shards=2)
    assert len({0, 2} & set(first)) == len({0, 2} & set(second)) == 1


def training_route(combine: type[Combine], placement: Placement) -> Route:
    """Route with room for every row of a batch on one shard."""
    rows = TINY.batch_size * MAX_LENGTH
    return Route.whole(combine.sized(placement, [rows] * placement.size(Role.TOKENS), rows))


def assert_close(one: TrainingState, other: TrainingState, atol: float) -> None:
    for a, b in zip(jax.tree.leaves(one.parameters), jax.tree.leaves(other.parameters), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def test_the_loss_is_that_of_the_answers_on_every_placement_and_strategy() -> None:
    found = []
    for placement, combine in (
        (PLACEMENT, ScatterCombine),
        (PLACEMENT, ReduceCombine),
        (OTHER_PLACEMENT, ScatterCombine),
    ):
        trainer = TINY.trainer(placement, training_route(combine, placement))
        run = jax.jit(lambda p, e, trainer=trainer: losses(trainer.decoder, p, e, trainer.route))
        found.append(run(trainer.decoder.init(0), trainer.examples(0)))
    split = SplitResidual(PLACEMENT)
    rows = TINY.batch_size * MAX_LENGTH
    capacity = split.capacity(rows)
    sized = AllToAllCombine.sized(split.ffn_placement, [capacity] * split.ffn_placement.size(Role.TOKENS), capacity)
    trainer = replace(TINY.trainer(PLACEMENT, SCATTER), route=Route(split, sized))
    found.append(
        jax.jit(lambda p, e: losses(trainer.decoder, p, e, trainer.route))(trainer.decoder.init(0), trainer.examples(0))
    )
    lossy = replace(sized, encoding=as_encoding("int8"))
    with pytest.raises(ConfigError, match="gathered exactly"):
        losses(trainer.decoder, trainer.decoder.parameters, trainer.examples(0), Route(split, lossy))
    batch = problems(TINY.batch_size, (TINY.seed, 0), digits=TINY.digits, held_out=False)
    single = Placement.parse("data=1")
    expected = _answer_nats(TINY.trainer(single, training_route(ReduceCombine, single)).decoder, batch)
    for one in found:
        np.testing.assert_allclose(one.next_token, expected, rtol=1e-5)
        np.testing.assert_allclose(one.balance, found[0].balance, rtol=1e-5)


def _answer_nats(decoder: ShardedDecoder, batch: list[Problem]) -> float:
    """Mean loss per answer token, with each problem alone in its batch."""
    encode, parameters = tokenizer().encode, decoder.init(0)
    alone = Route.whole(ScatterCombine(decoder.placement))
    run = jax.jit(lambda examples: losses(decoder, parameters, examples, alone).next_token)
    total = tokens = 0.0
    for problem in batch:
        prompt, answer = encode(problem.prompt).ids, encode(problem.answer + END).ids
        total += len(answer) * float(run(make_examples([prompt], [answer], decoder.placement, MAX_LENGTH)))
        tokens += len(answer)
    return total / tokens


def test_balance_is_one_when_even_and_e_when_one_expert_takes_all() -> None:
    even = Load(jnp.full((1, 8), 5.0), jnp.full((1, 8), 3.0))
    collapsed = Load(jnp.array([[40.0] + [0.0] * 7]), jnp.array([[24.0] + [0.0] * 7]))
    np.testing.assert_allclose(_balance(even), [1])
    np.testing.assert_allclose(_balance(collapsed), [8])


class InterruptedExamples:
    """Examples that interrupt the run at one step."""

    def __init__(self, examples: Callable[[int], Examples]) -> None:
        self.at: int | None = None
        self._examples = examples

    def __call__(self, step: int) -> Examples:
        if step == self.at:
            raise KeyboardInterrupt
        return self._examples(step)


def test_a_killed_run_resumes_from_its_last_save_on_any_mesh(tmp_path: Path) -> None:
    trainer = TINY.trainer(PLACEMENT, SCATTER)
    interrupted = InterruptedExamples(trainer.examples)
    trainer = replace(trainer, examples=interrupted)
    whole = trainer.run(tmp_path / "whole", 4)
    interrupted.at = 3  # between two saves: resuming repeats step 2
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path / "killed", 4, save_every=2)
    interrupted.at = 0
    assert_close(trainer.run(tmp_path / "whole", 4), whole, atol=0)
    resumed = TINY.trainer(OTHER_PLACEMENT, training_route(ReduceCombine, OTHER_PLACEMENT)).run(tmp_path / "killed", 4)
    assert int(resumed.step) == 4
    assert_close(resumed, whole, atol=1e-4)


def test_optimizer_moments_are_sharded_as_their_parameters() -> None:
    trainer = TINY.trainer(PLACEMENT, SCATTER)
    state = trainer.initial_state()
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    shardings = [leaf.sharding for leaf in jax.tree.leaves(trainer.decoder.parameters)]
    assert [moment.sharding for moment in moments] == 2 * shardings


def test_states_of_another_model_are_refused(tmp_path: Path) -> None:
    trainer = TINY.trainer(PLACEMENT, SCATTER)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, trainer.initial_state())
    other = replace(trainer.decoder, config=replace(trainer.decoder.config, hidden=64))
    with pytest.raises(CheckpointError, match="does not hold what this model needs"):
        replace(trainer, decoder=other).run(tmp_path, 4)


def test_a_run_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "model.training").mkdir()
    (tmp_path / "model.training" / "recipe.json").write_text('{"seed": 5}')
    with pytest.raises(CheckpointError, match="the states of a run with other settings"):
        train(TINY, tmp_path / "model", PLACEMENT, SCATTER, progress=False)


def test_damaged_states_are_reported(tmp_path: Path) -> None:
    trainer = TINY.trainer(PLACEMENT, SCATTER)
    with TrainingCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(2, trainer.initial_state())
    for path in (tmp_path / "2").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(CheckpointError, match="2 is damaged, or does not hold what this model needs"):
        trainer.run(tmp_path, 4)


def test_held_out_problems_are_never_trained_on() -> None:
    trained = {(p.left, p.right) for step in range(20) for p in problems(512, (0, step), digits=4, held_out=False)}
    held_out = problems(500, (0,), digits=4, held_out=True)
    assert not trained & {(problem.left, problem.right) for problem in held_out}
    every = [Problem(left, right) for left in range(200) for right in range(200)]
    assert 0.01 < np.mean([problem.held_out for problem in every]) < 0.03
    assert problems(50, (0, 7), digits=3, held_out=False) == problems(50, (0, 7), digits=3, held_out=False)
    assert {len(str(problem.left)) for problem in held_out} == {1, 2, 3, 4}


def test_tokenizer_round_trip() -> None:
    encoder = tokenizer()
    assert encoder.get_vocab_size() == len(CHARACTERS) + 1
    ids = encoder.encode("12+345=357" + END).ids
    assert len(ids) == 11
    assert encoder.decode(ids) == "12+345=357"
