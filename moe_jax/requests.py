"""What users ask for and get back. Nothing here imports jax."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

from moe_jax.errors import RequestError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Raises:
      RequestError: a value out of range.
    """

    max_tokens: int = 16
    """The most tokens to generate; 0 generates nothing."""
    temperature: float = 1.0
    """0 always takes the likeliest token; the others then play no part."""
    top_k: int = 0
    """Keep only the likeliest k tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep only the likeliest tokens that together reach this probability, after `top_k`."""
    seed: int | None = None
    """The same seed draws the same tokens from the same logits, whatever else is in the batch; `None` draws a new seed
    each time."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Whether to go on past the model's own end tokens."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k"):
            if not isinstance(getattr(self, name), Integral):
                raise RequestError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not all(isinstance(token, Integral) for token in self.stop_token_ids):
            raise RequestError(f"stop_token_ids must be token ids, got {self.stop_token_ids!r}")
        if self.max_tokens < 0:
            raise RequestError(f"max_tokens must be 0 or more, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature must be 0 (greedy) or a positive number, got {self.temperature}")
        if self.top_k < 0:
            raise RequestError(f"top_k must be positive, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise RequestError(f"seed must be from 0 to 2**32 - 1, got {self.seed}")


@dataclass(frozen=True)
class RequestOutput:
    """The generated continuation of one prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    """The generated tokens, with the one that ended the request, if one did."""
    logprobs: list[float] = field(default_factory=list)
    """The natural log-probability of each generated token under the model, before temperature, top-k and top-p."""
    finish_reason: FinishReason = "length"
    """`stop`: an end token came; `length`: `max_tokens` were generated or the cache was full."""
    text: str | None = None
    """The generated text without special tokens; `None` for a checkpoint without a tokenizer."""
