"""A task with a checkable answer: `12+345=` is continued with `357` and an end token.

The problems are split once and for all by a hash of their numbers: those held out are never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = "0123456789+="
END = "<end>"
HELD_OUT_SHARE = 0.02


@dataclass(frozen=True)
class Problem:
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
    """Random problems of numbers of up to `digits` digits, each number of digits as likely, from one side of the
    split."""
    random = np.random.default_rng(seed)
    found: list[Problem] = []
    while len(found) < count:
        most = 10 ** random.integers(1, digits + 1, (count, 2))
        drawn = (Problem(*map(int, pair)) for pair in random.integers(0, most))
        found += [problem for problem in drawn if problem.held_out == held_out]
    return found[:count]


def tokenizer() -> Tokenizer:
    """One token for each character, and one that ends the answer; other characters are refused."""
    vocabulary = {token: number for number, token in enumerate([*CHARACTERS, END])}
    made = Tokenizer(models.WordLevel(vocabulary))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([END])
    return made
