"""NumPy reference of block diffusion: one sequence, no cache, every step runs the whole sequence.

Written from descriptions of the method, for `goldens/make_plain_goldens.py` and tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

Logits = Callable[[list[int]], np.ndarray]


@dataclass
class Decoded:
    """Output of `decode`."""

    tokens: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    """Logits of each token in the step that chose it."""
    steps: list[int] = field(default_factory=list)
    """Number of tokens that each step chose, block after block."""
    margins: list[float] = field(default_factory=list)
    """Distance of each decision from a different one, as a probability."""


def decode(
    logits: Logits,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    block: int,
    mask: int,
    threshold: float,
    steps: int,
    ends: Collection[int] = (),
) -> Decoded:
    """Decode greedily up to `max_tokens` tokens, or up to the first token in `ends`."""
    decoded, known = Decoded(), list(prompt)
    chosen_logits: dict[int, np.ndarray] = {}
    while len(known) < len(prompt) + max_tokens and not set(known[len(prompt) :]) & set(ends):
        first = len(known) // block * block
        block_tokens: list[int | None] = [*known[first:], *[None] * (first + block - len(known))]
        for step in range(steps):
            masked = [place for place in range(block) if block_tokens[place] is None]
            if not masked:
                break
            rows = logits(known[:first] + [mask if token is None else token for token in block_tokens])[first:]
            rows[:, mask] = -np.inf
            probabilities = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
            confident = [place for place in masked if probabilities[place].max() > threshold]
            quota = block // steps + (step < block % steps)
            ranked = sorted(masked, key=lambda place: (-probabilities[place].max(), place))
            chosen = confident if len(confident) >= quota else ranked[:quota]
            decoded.margins += _margins(probabilities, masked, chosen, threshold)
            decoded.steps.append(len(chosen))
            for place in chosen:
                block_tokens[place] = int(probabilities[place].argmax())
                chosen_logits[first + place] = rows[place]
        known[first:] = [token for token in block_tokens if token is not None]
        assert len(known) == first + block
    tokens = known[len(prompt) : len(prompt) + max_tokens]
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    decoded.tokens = tokens[: stop + 1]
    decoded.logits = [chosen_logits[len(prompt) + place] for place in range(len(decoded.tokens))]
    return decoded


def _margins(probabilities: np.ndarray, places: list[int], chosen: list[int], threshold: float) -> list[float]:
    best = {place: np.sort(probabilities[place])[-2:] for place in places}
    margins = [abs(best[place][1] - threshold) for place in places]
    margins += [best[place][1] - best[place][0] for place in chosen]
    unchosen = [best[place][1] for place in places if place not in chosen]
    return margins + ([min(best[place][1] for place in chosen) - max(unchosen)] if unchosen else [])
