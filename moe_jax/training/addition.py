"""Addition as a language task: the answer to `12+345=` is `357` and an end token.

A hash of the two numbers decides which problems are held out; training never uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = "0123456789+="
END = "<end>"
HELD_OUT_SHARE = 0.02
"""Expected share of the problems that are held out."""


@dataclass(frozen=True)
class Problem:
    """An addition of two numbers."""

    left: int
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        return str(self.left + self.right)

    @property
    def held_out(self) -> bool:
        mixed = (self.left * 0x9E3779B1 + self.right * 0x85EBCA77) % 2**32
        mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D % 2**32
        return mixed ^ mixed >> 13 < HELD_OUT_SHARE * 2**32


def problems(count: int, seed: Sequence[int], *, digits: int, held_out: bool) -> list[Problem]:
    """Draw problems that are all held out, or all not. Numbers have 1 to `digits` digits, each count equally likely."""
    random = np.random.default_rng(seed)
    found: list[Problem] = []
    while len(found) < count:
        limits = 10 ** random.integers(1, digits + 1, (count, 2))
        drawn = (Problem(*map(int, pair)) for pair in random.integers(0, limits))
        found += [problem for problem in drawn if problem.held_out == held_out]
    return found[:count]


def tokenizer() -> Tokenizer:
    """Character tokenizer of the task, with a token that ends the answer; it refuses other characters."""
    vocabulary = {token: number for number, token in enumerate([*CHARACTERS, END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    return tokenizer
