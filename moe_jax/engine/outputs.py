"""Results for users: completions, whole requests, and events of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: a stop token or stop string; `length`: `max_tokens` tokens, or a full cache; `cancelled`: by the user;
`error`: a failure, described in `error`."""


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation."""

    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, including the stop token if there is one."""
    logprobs: list[float] = field(default_factory=list)
    """Natural log-probability of each generated token under the model, before the effect of any sampling parameter."""
    top_logprobs: list[dict[int, float]] | None = None
    """Most likely tokens at the place of each generated token, with their log-probabilities, most likely first; None
    unless `SamplingParams.logprobs` is positive."""
    finish_reason: FinishReason = "length"
    """Reason for the end of the continuation."""
    text: str | None = None
    """Generated text; None for a checkpoint without a tokenizer."""
    error: str | None = None
    """Description of a failure of this request."""


@dataclass(frozen=True)
class RequestOutput:
    """Results of one prompt.

    The properties `token_ids`, `logprobs`, `top_logprobs`, `finish_reason`, `text` and `error` are those of the first
    completion.
    """

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """The `SamplingParams.n` completions, at least one."""
    prompt_logprobs: list[float | None] | None = None
    """Log-probability of each prompt token, None for the first; None unless `SamplingParams.prompt_logprobs` is set."""
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    """Most likely tokens at the place of each prompt token, as in `CompletionOutput.top_logprobs`; None unless
    `SamplingParams.prompt_logprobs` is positive."""

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[float]:
        return self.outputs[0].logprobs

    @property
    def top_logprobs(self) -> list[dict[int, float]] | None:
        return self.outputs[0].top_logprobs

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def text(self) -> str | None:
        return self.outputs[0].text

    @property
    def error(self) -> str | None:
        return self.outputs[0].error


@dataclass(frozen=True)
class StreamEvent:
    """New output of one sample."""

    prompt: int
    """Index of the prompt in the call."""
    sample: int
    """Index of the sample among the samples of its prompt."""
    text: str | None
    """New text; None for a checkpoint without a tokenizer. Incomplete characters, and characters that may become part
    of a stop string, come with a later event."""
    token_ids: list[int]
    """New tokens."""
    logprobs: list[float]
    """Log-probabilities of the new tokens."""
    finish_reason: FinishReason | None
    """Reason for the end of the sample, in its last event; None in the others."""
    error: str | None = None
    """Description of a failure of this sample."""
