"""Block diffusion in plain NumPy: one sequence, no cache, every step from the first token on.

Written from descriptions of the method, for `goldens/make_plain_goldens.py` and tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

Logits = Callable[[list[int]], np.ndarray]


@dataclass
class Decoded:
    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    """At each token, when it was chosen."""
    steps: list[int] = field(default_factory=list)
    """Tokens that each step chose, block after block."""
    margins: list[float] = field(default_factory=list)
    """By how much each decision could have been another, as a probability."""


def decode(
    logits: Logits,
    prompt: Sequence[int],
    most: int,
    *,
    block: int,
    mask: int,
    threshold: float,
    steps: int,
    ends: Collection[int] = (),
) -> Decoded:
    """The likeliest token at each place; `most` of them, or up to one of `ends`."""
    told, known = Decoded(), list(prompt)
    found: dict[int, np.ndarray] = {}
    while len(known) < len(prompt) + most and not set(known[len(prompt) :]) & set(ends):
        first = len(known) // block * block
        held: list[int | None] = [*known[first:], *[None] * (first + block - len(known))]
        for step in range(steps):
            open_places = [place for place in range(block) if held[place] is None]
            if not open_places:
                break
            rows = logits(known[:first] + [mask if token is None else token for token in held])[first:]
            rows[:, mask] = -np.inf
            odds = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
            sure = [place for place in open_places if odds[place].max() > threshold]
            count = block // steps + (step < block % steps)
            ranked = sorted(open_places, key=lambda place: (-odds[place].max(), place))
            chosen = sure if len(sure) >= count else ranked[:count]
            told.margins += _margins(odds, open_places, chosen, threshold)
            told.steps.append(len(chosen))
            for place in chosen:
                held[place] = int(odds[place].argmax())
                found[first + place] = rows[place]
        known[first:] = [token for token in held if token is not None]
        assert len(known) == first + block
    tokens = known[len(prompt) : len(prompt) + most]
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    told.tokens = tokens[: stop + 1]
    told.logits = [found[len(prompt) + place] for place in range(len(told.tokens))]
    return told


def _margins(odds: np.ndarray, places: list[int], chosen: list[int], threshold: float) -> list[float]:
    best = {place: np.sort(odds[place])[-2:] for place in places}
    margins = [abs(best[place][1] - threshold) for place in places]
    margins += [best[place][1] - best[place][0] for place in chosen]
    left = [best[place][1] for place in places if place not in chosen]
    return margins + ([min(best[place][1] for place in chosen) - max(left)] if left else [])
