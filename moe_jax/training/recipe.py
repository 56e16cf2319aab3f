"""How the bundled model was made: a small Qwen3-MoE that adds numbers of up to four digits."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optax

from moe_jax.checkpoints.checkpoint import CONFIG, TOKENIZER, Checkpoint, check_new, new_directory
from moe_jax.checkpoints.families import FAMILIES
from moe_jax.checkpoints.fields import Fields
from moe_jax.errors import CheckpointError
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.sharding import Placement, Route
from moe_jax.training.addition import END, problems, tokenizer
from moe_jax.training.examples import Examples, examples
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
LONGEST = 16
"""Tokens of the longest problem with its answer, less one."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the trained weights, up to rounding, besides `MODEL`."""

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

        def drawn(step: int) -> Examples:
            batch = problems(self.batch_size, (self.seed, step), digits=self.digits, held_out=False)
            prompts = [encode(problem.prompt).ids for problem in batch]
            return examples(prompts, [encode(problem.answer + END).ids for problem in batch], placement, LONGEST)

        return Trainer(
            ShardedDecoder(Fields(MODEL).read(FAMILIES[MODEL["model_type"]].read), placement, "float32"),
            self._optimizer(),
            drawn,
            route,
            self.balance_weight,
            self.seed,
        )

    def _optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0, self.peak_learning_rate, min(self.warmup_steps, self.steps // 2), self.steps
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=self.weight_decay))


def train(recipe: Recipe, output: Path, placement: Placement, route: Route, *, progress: bool) -> TrainingState:
    """Follow the recipe and write the model, in Hugging Face layout, to the new directory `output`.

    Training states are kept beside it, in `output` with `.training` added, until it is written: a run that was killed
    goes on from there.

    Raises:
      CheckpointError: `output` exists, or the states beside it are those of another recipe.
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
    """Note the recipe in a directory of training states; refuse one that was begun with another."""
    directory.mkdir(parents=True, exist_ok=True)
    note, described = directory / "recipe.json", json.dumps({"model": MODEL, **asdict(recipe)}, indent=2)
    if not note.exists():
        note.write_text(described)
    elif note.read_text() != described:
        raise CheckpointError(
            f"{directory} holds the states of a run with other settings ({note}): repeat those, or remove the directory"
        )


def _write(output: Path, decoder: ShardedDecoder, parameters: Parameters) -> None:
    with new_directory(output) as new:
        (new / CONFIG).write_text(json.dumps(MODEL, indent=2) + "\n")
        tokenizer().save(str(new / TOKENIZER))
        Checkpoint(new).write_tensors(new, decoder, parameters)
