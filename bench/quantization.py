"""Memory and accuracy of weights in eight bits.

    weights   KiB of the parameters on each device
    median    relative error of a row of logits against exact weights (L2 norm), median over rows
    p90       90th percentile of that error; a row whose experts score almost equally may be routed to other experts
    loss      mean negative log-likelihood of the tokens of right answers, in nats; bundled model only
    right     share of held-out additions that are answered exactly; bundled model only

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
FORMATS = {"median": ".4f", "p90": ".4f", "loss": ".5f", "exact_match": ".2%"}


def measure(dtype: WeightDtype, options: Namespace, placement: Placement) -> tuple[dict[str, Any], np.ndarray]:
    """Results of one dtype, and its logits."""
    checkpoint = Checkpoint(options.model)
    decoder = ShardedDecoder(
        checkpoint.config, placement, options.dtype, quantization=checkpoint.quantization(dtype.value)
    )
    llm = LLM(options.model, mesh=placement, dtype=options.dtype, weight_dtype=dtype.value, max_length=64)
    result: dict[str, Any] = {"weight_dtype": dtype.value, "weight_bytes": held_bytes(decoder.parameters)}
    if options.model != ADDER:
        random = np.random.default_rng(0)
        prompts = [random.integers(0, llm.config.vocab_size, 32).tolist() for _ in range(options.problems)]
        return result, np.concatenate(llm.logits(prompts))
    problems = held_out(options.problems)
    texts = [problem.prompt + problem.answer for problem in problems]
    logits = llm.logits(texts)
    losses = [
        loss(llm, *each) for each in zip(texts, (len(problem.answer) for problem in problems), logits, strict=True)
    ]
    result["loss"] = float(np.mean(np.concatenate(losses)))
    result["exact_match"] = evaluate(llm, problems).exact_match
    return result, np.concatenate(logits)


def loss(llm: LLM, text: str, answer: int, logits: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of each of the last `answer` tokens of a text; each character is a token."""
    assert llm.tokenizer is not None
    tokens = llm.tokenizer.encode(text).ids
    first = len(tokens) - answer
    return -log_softmax(logits[first - 1 : -1], axis=-1)[np.arange(answer), tokens[first:]]


def main() -> None:
    parser = script.parser("quantization", "Memory and accuracy of weights in eight bits.", repeats=1)
    parser.add_argument("--model", type=Path, metavar="DIR", default=ADDER, help="directory of a checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of computation and of exact weights")
    parser.add_argument(
        "--problems",
        type=script.positive,
        default=512,
        help="number of additions, or of random prompts for other models",
    )
    options, placement = script.begin(parser, QUICK)
    columns = {"weight_dtype": ">13", "weights, KiB": ">13", "median": ">9", "p90": ">9", "loss": ">9", "right": ">8"}
    table, results, exact = script.Table(columns), [], np.empty(0)
    for dtype in WeightDtype:
        result, logits = measure(dtype, options, placement)
        exact = logits if dtype is WeightDtype.EXACT else exact
        errors = np.linalg.norm(logits - exact, axis=1) / np.linalg.norm(exact, axis=1)
        result |= {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))}
        results.append(result)
        cells = (f"{result[name]:{form}}" if name in result else "" for name, form in FORMATS.items())
        table.row(dtype.value, f"{result['weight_bytes'] / 1024:.1f}", *cells)

    def draw(axes: script.Axes) -> None:
        axes.bar(
            [result["weight_dtype"] for result in results],
            [result["weight_bytes"] / 1024 for result in results],
            label="weights",
        )
        axes.set_ylabel("KiB of weights on each device")

    script.finish("quantization", options, placement, {"results": results}, draw)


if __name__ == "__main__":
    script.run(main)
