"""Exact-match accuracy of a model on held-out additions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.llm.llm import LLM
from moe_jax.training.addition import Problem, problems

MAX_ANSWER_TOKENS = 8
"""Number of tokens that an answer may have, the end token included."""


@dataclass(frozen=True)
class Evaluation:
    """Problems and the answers of a model."""

    problems: list[Problem]
    answers: list[str]

    @property
    def exact_match(self) -> float:
        """Share of the answers that equal the right answer."""
        right = sum(answer == problem.answer for problem, answer in zip(self.problems, self.answers, strict=True))
        return right / len(self.problems)


def held_out(count: int, digits: int = 4) -> list[Problem]:
    """Problems that the recipe never trains on; every call returns the same ones."""
    return problems(count, (0,), digits=digits, held_out=True)


def evaluate(llm: LLM, problems: Sequence[Problem], *, progress: bool = False) -> Evaluation:
    """Answer problems by greedy decoding."""
    greedy = SamplingParams(temperature=0, max_tokens=MAX_ANSWER_TOKENS)
    outputs = llm.generate([problem.prompt for problem in problems], greedy, progress=progress)
    return Evaluation(list(problems), [output.text or "" for output in outputs])
