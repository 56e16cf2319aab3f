"""Exact match of a model on held-out additions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.llm.llm import LLM
from moe_jax.training.addition import Problem, problems

LONGEST_ANSWER = 8
"""Tokens, with the end token, that an answer may take."""


@dataclass(frozen=True)
class Evaluation:
    problems: list[Problem]
    answers: list[str]

    @property
    def exact_match(self) -> float:
        """The share of answers that are right to the last digit."""
        right = sum(answer == problem.answer for problem, answer in zip(self.problems, self.answers, strict=True))
        return right / len(self.problems)


def held_out(count: int, digits: int = 4) -> list[Problem]:
    """Problems that the recipe never trains on, the same ones every time."""
    return problems(count, (0,), digits=digits, held_out=True)


def evaluate(llm: LLM, asked: Sequence[Problem], *, progress: bool = False) -> Evaluation:
    """Let the model answer greedily."""
    greedy = SamplingParams(temperature=0, max_tokens=LONGEST_ANSWER)
    outputs = llm.generate([problem.prompt for problem in asked], greedy, progress=progress)
    return Evaluation(list(asked), [output.text or "" for output in outputs])
