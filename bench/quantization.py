"""What weights in eight bits save, and what they cost in accuracy.

    weights   bytes of the parameters on each device
    median    of all rows, how far logits are from those of exact weights, as a share of their length
    p90       which nine in ten rows are below; where an expert is chosen by a hair, another one may be
    loss      mean of -log p of the tokens of right answers; of the bundled model
    right     answers of held-out additions that are right to the last digit; of the bundled model

python -m bench.quantization [--model DIR] [--quick]; --help lists the rest.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from bench import script
from moe_jax import LLM
from moe_jax.analysis.roofline import held_bytes
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.config import WeightDtype
from moe_jax.models import ShardedDecoder
from moe_jax.models.sharded import DTYPES
from moe_jax.sharding import Placement
from moe_jax.training.evaluation import evaluate, held_out

QUICK = {"problems": 8}
TOLD = {"median": ".4f", "p90": ".4f", "loss": ".5f", "exact_match": ".2%"}


def measure(dtype: WeightDtype, options: Namespace, placement: Placement) -> tuple[dict[str, Any], np.ndarray]:
    """What is told of one dtype, and the logits that it gives."""
    checkpoint = Checkpoint(options.model)
    decoder = ShardedDecoder(
        checkpoint.config, placement, options.dtype, quantization=checkpoint.quantization(dtype.value)
    )
    llm = LLM(options.model, mesh=placement, dtype=options.dtype, weight_dtype=dtype.value, max_length=64)
    found: dict[str, Any] = {"weight_dtype": dtype.value, "weight_bytes": held_bytes(decoder.parameters)}
    if options.model != ADDER:
        random = np.random.default_rng(0)
        prompts = [random.integers(0, llm.config.vocab_size, 32).tolist() for _ in range(options.problems)]
        return found, np.concatenate(llm.logits(prompts))
    problems = held_out(options.problems)
    texts = [problem.prompt + problem.answer for problem in problems]
    logits = llm.logits(texts)
    losses = [
        loss(llm, *each) for each in zip(texts, (len(problem.answer) for problem in problems), logits, strict=True)
    ]
    found["loss"] = float(np.mean(np.concatenate(losses)))
    found["exact_match"] = evaluate(llm, problems).exact_match
    return found, np.concatenate(logits)


def loss(llm: LLM, text: str, answer: int, logits: np.ndarray) -> np.ndarray:
    """Of each of the last `answer` tokens of a text, one for each of its characters."""
    assert llm.tokenizer is not None
    tokens = llm.tokenizer.encode(text).ids
    first = len(tokens) - answer
    return -log_softmax(logits[first - 1 : -1], axis=-1)[np.arange(answer), tokens[first:]]


def main() -> None:
    parser = script.parser("quantization", "What weights in eight bits save, and what they cost.", repeats=1)
    parser.add_argument("--model", type=Path, metavar="DIR", default=ADDER, help="a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of computation, and of exact weights")
    parser.add_argument("--problems", type=script.positive, default=512, help="additions, or random prompts")
    options, placement = script.begin(parser, QUICK)
    columns = {"weight_dtype": ">13", "weights, KiB": ">13", "median": ">9", "p90": ">9", "loss": ">9", "right": ">8"}
    table, results, exact = script.Table(columns), [], np.empty(0)
    for dtype in WeightDtype:
        found, logits = measure(dtype, options, placement)
        exact = logits if dtype is WeightDtype.EXACT else exact
        of_rows = np.linalg.norm(logits - exact, axis=1) / np.linalg.norm(exact, axis=1)
        found |= {"median": float(np.median(of_rows)), "p90": float(np.quantile(of_rows, 0.9))}
        results.append(found)
        told = (f"{found[name]:{form}}" if name in found else "" for name, form in TOLD.items())
        table.row(dtype.value, f"{found['weight_bytes'] / 1024:.1f}", *told)

    def draw(axes: script.Axes) -> None:
        axes.bar(
            [found["weight_dtype"] for found in results],
            [found["weight_bytes"] / 1024 for found in results],
            label="weights",
        )
        axes.set_ylabel("KiB of weights on each device")

    script.finish("quantization", options, placement, {"results": results}, draw)


if __name__ == "__main__":
    script.run(main)
