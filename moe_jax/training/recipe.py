"""Recipe of the bundled model: a small Qwen3-MoE that adds numbers of up to four digits."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optax

from moe_jax.checkpoints.checkpoint import CONFIG, TOKENIZER, Checkpoint
from moe_jax.checkpoints.directories import check_new, new_directory
from moe_jax.checkpoints.families import FAMILIES
from moe_jax.checkpoints.fields import Fields
from moe_jax.errors import CheckpointError
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.sharding import Placement, Route
from moe_jax.training.addition import END, problems, tokenizer
from moe_jax.training.examples import Examples, make_examples
from moe_jax.training.trainer import Trainer, TrainingState

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 16,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 12,
    "dtype": "bfloat16",
}
MAX_LENGTH = 16
"""Number of input tokens of the longest problem with its answer; the last token is a target alone."""


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters. With `MODEL`, they determine the trained weights up to rounding."""

    digits: int = 4
    batch_size: int = 512
    steps: int = 1500
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    balance_weight: float = 0.01
    seed: int = 0

    def trainer(self, placement: Placement, route: Route) -> Trainer:
        encode = tokenizer().encode

        def examples(step: int) -> Examples:
            batch = problems(self.batch_size, (self.seed, step), digits=self.digits, held_out=False)
            prompts = [encode(problem.prompt).ids for problem in batch]
            answers = [encode(problem.answer + END).ids for problem in batch]
            return make_examples(prompts, answers, placement, MAX_LENGTH)

        config = Fields(MODEL).read(FAMILIES[MODEL["model_type"]].read)
        return Trainer(
            decoder=ShardedDecoder(config, placement, "float32"),
            optimizer=self._optimizer(),
            examples=examples,
            route=route,
            balance_weight=self.balance_weight,
            seed=self.seed,
        )

    def _optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0, self.peak_learning_rate, min(self.warmup_steps, self.steps // 2), self.steps
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay))


def train(recipe: Recipe, output: Path, placement: Placement, route: Route, *, progress: bool) -> TrainingState:
    """Train by the recipe and write the model, in Hugging Face layout, to the new directory `output`.

    Until the model is written, training states are saved in the directory `<output>.training`. A later call with the
    same recipe resumes from them.

    Raises:
      CheckpointError: `output` exists, or the saved states belong to another recipe.
    """
    check_new(output)
    trainer = recipe.trainer(placement, route)
    unfinished = output.with_name(output.name + ".training")
    _check_same(recipe, unfinished)
    state = trainer.run(unfinished / "states", recipe.steps, progress=progress)
    _write(output, trainer.decoder, state.parameters)
    shutil.rmtree(unfinished)
    return state


def _check_same(recipe: Recipe, directory: Path) -> None:
    """Record the recipe in a directory of training states; refuse a directory that another recipe began."""
    directory.mkdir(parents=True, exist_ok=True)
    record, content = directory / "recipe.json", json.dumps({"model": MODEL, **asdict(recipe)}, indent=2)
    if not record.exists():
        record.write_text(content)
    elif record.read_text() != content:
        raise CheckpointError(
            f"{directory} holds the states of a run with other settings: repeat the settings in {record}, "
            "or remove the directory"
        )


def _write(output: Path, decoder: ShardedDecoder, parameters: Parameters) -> None:
    with new_directory(output) as new:
        (new / CONFIG).write_text(json.dumps(MODEL, indent=2) + "\n")
        tokenizer().save(str(new / TOKENIZER))
        Checkpoint(new).write_tensors(new, decoder, parameters)
