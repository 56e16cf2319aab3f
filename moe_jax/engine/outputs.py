"""Outputs of requests: completions, whole requests, and events of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation."""

    token_ids: list[int] = field(default_factory=list)
    """The generated tokens, with the one that ended it, if one did."""
    logprobs: list[float] = field(default_factory=list)
    """The natural log-probability of each generated token under the model, before anything in `SamplingParams`."""
    top_logprobs: list[dict[int, float]] | None = None
    """For each generated token, the likeliest tokens at its place with their log-probabilities, likeliest first; `None`
    where `SamplingParams.logprobs` asked for none."""
    finish_reason: FinishReason = "length"
    """`stop`: an end token or stop string came; `length`: `max_tokens` were generated or the cache was full;
    `cancelled`: by the user; `error`: see `error`."""
    text: str | None = None
    """The generated text; `None` for a checkpoint without a tokenizer."""
    error: str | None = None
    """What went wrong with this request alone."""


@dataclass(frozen=True)
class RequestOutput:
    """What became of one prompt: its samples, `SamplingParams.n` of them.

    The fields of the first sample are read as if they were the output's own: `output.text`, `output.token_ids`.
    """

    prompt_token_ids: list[int]
    samples: list[CompletionOutput]
    """At least one, in the order of their draws."""
    prompt_logprobs: list[float | None] | None = None
    """The log-probability of each token of the prompt, `None` for the first, which follows nothing; `None` where
    `SamplingParams.prompt_logprobs` is."""
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    """The likeliest tokens at each place of the prompt, as `CompletionOutput.top_logprobs`; `None` where
    `SamplingParams.prompt_logprobs` asked for none."""

    @property
    def token_ids(self) -> list[int]:
        return self.samples[0].token_ids

    @property
    def logprobs(self) -> list[float]:
        return self.samples[0].logprobs

    @property
    def top_logprobs(self) -> list[dict[int, float]] | None:
        return self.samples[0].top_logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason

    @property
    def text(self) -> str | None:
        return self.samples[0].text

    @property
    def error(self) -> str | None:
        return self.samples[0].error


@dataclass(frozen=True)
class StreamEvent:
    """What is new of one sample."""

    prompt: int
    """Its place in the call."""
    sample: int
    text: str | None
    """Complete characters only, and nothing that may yet become part of a stop string; `None` for a checkpoint without
    a tokenizer."""
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None
    """`None` while more is to come; see `CompletionOutput`."""
    error: str | None = None
