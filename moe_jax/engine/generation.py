"""What one sample of a request has come to so far: tokens, text, log-probabilities, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from moe_jax.config.sampling_params import DEFAULT_CONFIDENCE_THRESHOLD, SamplingParams
from moe_jax.engine.detokenizer import Detokenizer, StopStrings
from moe_jax.engine.outputs import FinishReason
from moe_jax.programs import DenoisingSchedule
from moe_jax.programs.sampling import SamplingMetadata
from moe_jax.scheduler import DiffusionRequest, Request

TopLogprobs = dict[int, float]
"""The log-probability of each of the likeliest tokens, likeliest first."""


class OutputNeed(Enum):
    """What a request asks of the devices besides the likeliest token."""

    SAMPLING = auto()
    """Anything but the likeliest token of the model."""
    TOP_LOGPROBS = auto()
    """The likeliest tokens beside the chosen one."""
    LOGITS = auto()
    """Those after each token of the prompt."""


class StepOutput(NamedTuple):
    """What a dispatch gave one request."""

    tokens: list[int]
    logprobs: list[float]
    segment: int
    """Of the results, over all token shards."""
    is_sound: bool
    """Whether the log-probabilities are numbers."""


@dataclass
class PromptOutput:
    """What is told of a prompt, where it is asked for."""

    logprobs: list[float | None] = field(default_factory=lambda: [None])
    """Of each token; the first follows nothing."""
    top_logprobs: list[TopLogprobs | None] = field(default_factory=lambda: [None])
    logits: list[np.ndarray] = field(default_factory=list)
    """After each token, a part of the prompt at a time."""


class OutputQueue:
    """Generations that got something since they were last looked at, in the order of its coming."""

    def __init__(self) -> None:
        self._waiting: dict[Generation, None] = {}

    def add(self, generation: Generation) -> None:
        self._waiting[generation] = None

    def read(self) -> Iterator[Generation]:
        """Each once, until there is none."""
        while self._waiting:
            generation = next(iter(self._waiting))
            del self._waiting[generation]
            yield generation


class Generation:
    """One sample of one request, from its arrival to its end."""

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        seed: int,
        stop_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        queue: OutputQueue,
        *,
        wants_logits: bool = False,
    ) -> None:
        """
        Args:
          end_ids: tokens that end it.
          news: where it is put whenever it got something, or ended.
          wants_logits: whether the logits after each token of the prompt are wanted.
        """
        self.request, self.params, self.seed, self.stop_ids = request, params, seed, stop_ids
        self.wants_logits = wants_logits
        self.prompt_output = PromptOutput()
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.text = ""
        self.emitted = (0, 0)
        """Tokens and characters that whoever listens has had."""
        self.last_token_time = 0.0
        """When it came, or its last tokens did, by the engine's clock."""
        self._queue = queue
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        self._stops = StopStrings(params.stop or (), params.include_stop_str_in_output)
        self._read = 0

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @cached_property
    def sampling(self) -> SamplingMetadata:
        """Of this request alone."""
        return SamplingMetadata.of([self])

    @cached_property
    def schedule(self) -> DenoisingSchedule:
        """Where it is decoded in blocks; one of which nothing is wanted takes one step."""
        assert isinstance(self.request, DiffusionRequest)
        params, block = self.params, self.request.block
        threshold = DEFAULT_CONFIDENCE_THRESHOLD if params.confidence_threshold is None else params.confidence_threshold
        steps = (params.denoising_steps or block) if params.max_tokens else 1
        return DenoisingSchedule.of(threshold, steps, len(self.prompt) + self.request.max_tokens)

    @property
    def needs(self) -> list[OutputNeed]:
        wanted = {
            OutputNeed.SAMPLING: not self.params.is_plain_greedy,
            OutputNeed.TOP_LOGPROBS: self.params.logprobs or self.params.prompt_logprobs,
            OutputNeed.LOGITS: self.wants_logits,
        }
        return [need for need, is_wanted in wanted.items() if is_wanted]

    @property
    def wants_top_logprobs(self) -> bool:
        return bool(self.params.logprobs)

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether anything is asked of the prompt's own tokens."""
        return self.wants_logits or self.params.prompt_logprobs is not None

    def append(self, landing: StepOutput) -> None:
        """Take tokens, up to the one that ends the request."""
        before = len(self.tokens)
        self.tokens += landing.tokens
        self.logprobs += landing.logprobs
        has_end = not self.stop_ids.isdisjoint(landing.tokens)
        if has_end:
            ends = (place for place in range(before, len(self.tokens)) if self.tokens[place] in self.stop_ids)
            self._cut(next(ends) + 1)
        if self.params.stop and self._stops_within(before):
            return
        if has_end:
            self.finish("stop")
        elif len(self.tokens) == self.request.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Nothing more will come."""
        self.write()
        if self._detokenizer is not None:
            emitted, _ = self._stops.push(self._detokenizer.finish())
            self.text += emitted + self._stops.finish()
        self.finish_reason, self.error = reason, error
        self.__dict__.pop("sampling", None)
        self.__dict__.pop("schedule", None)

    def write(self) -> str:
        """Bring the text up to the last token, but for characters that are not complete, and what may yet become part
        of a stop string."""
        if self.finish_reason is None:
            self._read_to(len(self.tokens))
        return self.text

    def report(self) -> None:
        """Tell whoever waits for it that there is something new."""
        self._queue.add(self)

    def count_new(self) -> int:
        """Tokens that have come since it was last asked."""
        before, self.emitted = self.emitted, (len(self.tokens), 0)
        return len(self.tokens) - before[0]

    def _cut(self, end: int) -> None:
        for column in (self.tokens, self.logprobs, self.top_logprobs):
            del column[end:]

    def _stops_within(self, first: int) -> bool:
        """Whether a stop string ends in one of the tokens from `first` on; what comes after that token is dropped."""
        for end in range(first + 1, len(self.tokens) + 1):
            if self._read_to(end):
                self._cut(end)
                self.finish_reason = "stop"
                return True
        return False

    def _read_to(self, end: int) -> bool:
        """Write the text of the tokens before `end`. Whether a stop string is in it."""
        if self._tokenizer is None or end == self._read:
            return False
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._tokenizer, self.params.skip_special_tokens)
        emitted, stops = self._stops.push(self._detokenizer.push(self.tokens[self._read : end]))
        self.text += emitted
        self._read = end
        return stops
