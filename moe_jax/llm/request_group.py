"""One prompt of a call, with its samples and their outputs."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from tokenizers import Tokenizer

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, OutputQueue
from moe_jax.engine.outputs import CompletionOutput, FinishReason, RequestOutput, StreamEvent
from moe_jax.scheduler import Request


@dataclass(eq=False)
class RequestGroup:
    """One prompt with its `SamplingParams.n` samples."""

    number: int
    """Index of the prompt in the call."""
    prompt: list[int]
    """Token ids of the prompt."""
    params: SamplingParams
    max_tokens: int
    """Maximum tokens to generate, within the limit of the cache."""
    stop_ids: frozenset[int]
    """Tokens that end a sample."""
    tokenizer: Tokenizer | None
    logits_rows: int = 0
    """Number of last prompt tokens after which the logits are returned."""
    new_request: Callable[..., Request] = Request
    """Makes the scheduler's request of a sample."""
    generations: list[Generation] = field(default_factory=list)
    """The samples that have begun."""

    @property
    def samples(self) -> int:
        """Number of samples to run; 0 if neither tokens nor outputs of the prompt are requested."""
        return self.params.n if self.max_tokens or self._needs_prompt_rows else 0

    def begin(self, sample: int, queue: OutputQueue) -> Generation:
        """Make the generation of the next sample, which reports to `queue`."""
        assert sample == len(self.generations), "samples begin in order"
        # Outputs of a prompt and penalties need every prompt token in a step, not only its cached pages.
        shares_prefix = not (self._needs_prompt_rows or self.params.uses_penalties)
        request = self.new_request(
            secrets.token_hex(8), self.prompt, max(self.max_tokens, 1), self.params.priority, shares_prefix
        )
        generation = Generation(
            request,
            self.params,
            _seed_of(self.seed, sample),
            self.stop_ids,
            self.tokenizer,
            queue,
            logits_rows=self.logits_rows,
            sample=sample,
        )
        self.generations.append(generation)
        return generation

    @cached_property
    def seed(self) -> int:
        """Seed of the first sample."""
        return secrets.randbits(32) if self.params.seed is None else self.params.seed

    def output(self) -> RequestOutput:
        """Return the results of a group that has ended."""
        empty = (CompletionOutput(text=self._text("")) for _ in range(self.params.n))
        prompt = self.generations[0].prompt_output if self.params.prompt_logprobs is not None else None
        return RequestOutput(
            list(self.prompt),
            [self._completion(generation) for generation in self.generations] or list(empty),
            prompt_logprobs=prompt and prompt.logprobs,
            prompt_top_logprobs=prompt.top_logprobs if prompt and self.params.prompt_logprobs else None,
        )

    def event(self, generation: Generation) -> StreamEvent:
        """Return the output of a sample since its last event."""
        tokens, characters = generation.reported
        text = generation.update_text() if self.max_tokens else ""
        generation.reported = (len(generation.tokens), len(text))
        new = slice(tokens, self.max_tokens)
        return StreamEvent(
            prompt=self.number,
            sample=generation.sample,
            text=self._text(text[characters:]),
            token_ids=generation.tokens[new],
            logprobs=generation.logprobs[new],
            finish_reason=self._finish_reason(generation),
            error=generation.error,
        )

    @property
    def empty_events(self) -> list[StreamEvent]:
        """Final events of the samples of a group that does not run."""
        return [
            StreamEvent(self.number, sample, self._text(""), [], [], "length")
            for sample in range(0 if self.samples else self.params.n)
        ]

    @property
    def _needs_prompt_rows(self) -> bool:
        return bool(self.logits_rows) or self.params.prompt_logprobs is not None

    def _text(self, text: str) -> str | None:
        return None if self.tokenizer is None else text

    def _finish_reason(self, generation: Generation) -> FinishReason | None:
        """Return the reason for the end of a sample. A request for no tokens never ends by a stop token: the one
        generated token is dropped."""
        return "length" if not self.max_tokens and generation.finish_reason == "stop" else generation.finish_reason

    def _completion(self, generation: Generation) -> CompletionOutput:
        requested = slice(None, self.max_tokens)
        reason = self._finish_reason(generation)
        assert reason is not None
        return CompletionOutput(
            generation.tokens[requested],
            generation.logprobs[requested],
            generation.top_logprobs[requested] if self.params.logprobs else None,
            reason,
            self._text(generation.text if self.max_tokens else ""),
            generation.error,
        )


def _seed_of(seed: int, sample: int) -> int:
    """Return the 32-bit seed of one of several samples. The first sample has the seed of a single sample."""
    return seed if not sample and 0 <= seed < 2**32 else zlib.crc32(f"{seed} {sample}".encode())
