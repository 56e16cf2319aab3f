"""Outputs of a request that is still running, as the devices return them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

TopLogprobs = dict[int, float]
"""Most likely tokens at one place, with their log-probabilities, most likely first."""


class StepOutput(NamedTuple):
    """Tokens of one request from one dispatch."""

    tokens: list[int]
    logprobs: list[float]
    segment: int
    """Row of the outputs that holds the request, over all token shards."""
    is_finite: bool
    """True if all log-probabilities are finite."""


@dataclass
class PromptOutput:
    """Log-probabilities and logits of a prompt, as far as they are computed."""

    logprobs: list[float | None] = field(default_factory=lambda: [None])
    """Log-probability of each prompt token; None for the first, which follows no token."""
    top_logprobs: list[TopLogprobs | None] = field(default_factory=lambda: [None])
    """Most likely tokens at the place of each prompt token."""
    logits: list[np.ndarray] = field(default_factory=list)
    """Logits after each prompt token, in pieces of shape [tokens, vocabulary]."""
