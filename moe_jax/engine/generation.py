"""One sample of one request: its tokens, text and log-probabilities so far, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from functools import cached_property

from tokenizers import Tokenizer

from moe_jax.config.sampling_params import DEFAULT_CONFIDENCE_THRESHOLD, SamplingParams
from moe_jax.engine.detokenizer import Detokenizer, StopStrings
from moe_jax.engine.output_queue import OutputQueue
from moe_jax.engine.outputs import FinishReason
from moe_jax.engine.partial_outputs import PromptOutput, StepOutput, TopLogprobs
from moe_jax.programs import DenoisingSchedule
from moe_jax.programs.sampling import SamplingMetadata
from moe_jax.scheduler import DiffusionRequest, Request


class OutputNeed(Enum):
    """Work for the devices that a request needs besides greedy decoding."""

    SAMPLING = auto()
    """Sampling, penalties or biases."""
    TOP_LOGPROBS = auto()
    """Log-probabilities of the most likely tokens."""
    LOGITS = auto()
    """Logits after each prompt token."""


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
        logits_rows: int = 0,
        sample: int = 0,
    ) -> None:
        """
        Args:
          request: the request as the scheduler sees it.
          stop_ids: tokens that end the generation.
          tokenizer: decodes tokens into text; None for no text.
          queue: receives the generation whenever it has new output, or ends.
          logits_rows: number of last prompt tokens after which the logits are returned.
          sample: number of the sample among those of the request.
        """
        self.request, self.params, self.seed, self.stop_ids = request, params, seed, stop_ids
        self.logits_rows, self.sample = logits_rows, sample
        self.prompt_output = PromptOutput()
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[TopLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.text = ""
        self.reported = (0, 0)
        """Numbers of tokens and of characters that the caller has received."""
        self.last_token_time = 0.0
        """Time of the last tokens, or of the arrival, by the engine's clock."""
        self._queue, self._tokenizer = queue, tokenizer
        self._detokenizer: Detokenizer | None = None
        self._stop_strings = StopStrings(params.stop or (), params.include_stop_str_in_output)
        self._detokenized = 0
        self._hidden_tokens = 0
        """Number of tokens at the end without text: a stop token has none, unless it is requested."""

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @cached_property
    def sampling(self) -> SamplingMetadata:
        """Sampling parameters of this request, as arrays of one row."""
        return SamplingMetadata.of([self])

    @cached_property
    def schedule(self) -> DenoisingSchedule:
        """Denoising schedule of a block-diffusion request. A request for no tokens takes one step."""
        assert isinstance(self.request, DiffusionRequest)
        params, block = self.params, self.request.block
        threshold = DEFAULT_CONFIDENCE_THRESHOLD if params.confidence_threshold is None else params.confidence_threshold
        steps = (params.denoising_steps or block) if params.max_tokens else 1
        return DenoisingSchedule.of(threshold, steps, len(self.prompt) + self.request.max_tokens)

    @property
    def needs(self) -> list[OutputNeed]:
        is_needed = {
            OutputNeed.SAMPLING: not self.params.is_plain_greedy,
            OutputNeed.TOP_LOGPROBS: self.params.logprobs or self.params.prompt_logprobs,
            OutputNeed.LOGITS: self.logits_rows,
        }
        return [need for need, needed in is_needed.items() if needed]

    @property
    def wants_top_logprobs(self) -> bool:
        return bool(self.params.logprobs)

    @property
    def needs_prompt_rows(self) -> bool:
        """True if logits or log-probabilities of the prompt are requested."""
        return bool(self.logits_rows) or self.params.prompt_logprobs is not None

    def append(self, output: StepOutput) -> None:
        """Append the tokens of a step, up to a token or stop string that ends the generation."""
        before = len(self.tokens)
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        has_stop_id = not self.stop_ids.isdisjoint(output.tokens)
        if has_stop_id:
            places = (place for place in range(before, len(self.tokens)) if self.tokens[place] in self.stop_ids)
            self._truncate(next(places) + 1)
            self._hidden_tokens = int(not self.params.include_stop_str_in_output)
        if self.params.stop and self._stops_at_string(before):
            return
        if has_stop_id:
            self.finish("stop")
        elif len(self.tokens) == self.request.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the generation, and complete its text."""
        self.update_text()
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.finish())
            self.text += self._stop_strings.finish()
        self.finish_reason, self.error = reason, error
        self.__dict__.pop("sampling", None)
        self.__dict__.pop("schedule", None)

    def update_text(self) -> str:
        """Decode all tokens and return the text.

        While the generation runs, the text leaves out incomplete characters, and characters that may become part of a
        stop string.
        """
        if self.finish_reason is None:
            self._detokenize(len(self.tokens) - self._hidden_tokens)
        return self.text

    def report(self) -> None:
        """Put the generation into its output queue."""
        self._queue.add(self)

    def count_new(self) -> int:
        """Return the number of tokens since the last call."""
        before, self.reported = self.reported, (len(self.tokens), 0)
        return len(self.tokens) - before[0]

    def _truncate(self, end: int) -> None:
        for column in (self.tokens, self.logprobs, self.top_logprobs):
            del column[end:]

    def _stops_at_string(self, first: int) -> bool:
        """Decode the tokens from `first` on. If one of them completes a stop string, end the generation there."""
        for end in range(first + 1, len(self.tokens) - self._hidden_tokens + 1):
            if self._detokenize(end):
                self._truncate(end)
                self.finish_reason = "stop"
                return True
        return False

    def _detokenize(self, end: int) -> bool:
        """Append the text of the tokens before `end`. Return True if the text has a stop string."""
        if self._tokenizer is None or end == self._detokenized:
            return False
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(self._tokenizer, self.params.skip_special_tokens, self.prompt)
        new = self._detokenizer.push(self.tokens[self._detokenized : end])
        self._detokenized = end
        return self._add_text(new, self._detokenizer.pending if self.params.stop else "")

    def _add_text(self, new: str, pending: str = "") -> bool:
        """Append text, and return True if it has a stop string. The first `min_tokens` tokens cannot stop."""
        if self._detokenized <= self.params.min_tokens:
            self.text += new
            return False
        text, has_stop = self._stop_strings.push(new, pending)
        self.text += text
        return has_stop
