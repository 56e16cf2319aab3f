"""One prompt of a call: the samples that are generated for it, and what is told of them."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, OutputQueue
from moe_jax.engine.outputs import CompletionOutput, FinishReason, RequestOutput, StreamEvent
from moe_jax.scheduler import Request


@dataclass(frozen=True)
class StopTokens:
    """What a checkpoint says of texts."""

    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]
    """Tokens that end a text."""

    def of(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end a request of these parameters."""
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)


@dataclass(eq=False)
class RequestGroup:
    number: int
    """Its place in the call."""
    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    """As many as `max_tokens` and the cache allow."""
    has_text: bool
    """Whether there is a tokenizer."""
    wants_logits: bool = False
    new_request: Callable[..., Request] = Request
    """Makes what is scheduled."""
    generations: list[Generation] = field(default_factory=list)
    """The samples, once it has begun."""

    @property
    def samples(self) -> int:
        """Generations that it needs; none where nothing is asked."""
        return self.params.n if self.max_tokens or self._needs_prompt_rows else 0

    def begin(self, ends: StopTokens, queue: OutputQueue) -> list[Generation]:
        """The generations to run, which report to `queue`."""
        seed = secrets.randbits(32) if self.params.seed is None else self.params.seed
        # What is told of a prompt is computed with it, and penalties look at tokens that the devices have been sent.
        shares_prefix = not (self._needs_prompt_rows or self.params.uses_penalties)
        for sample in range(self.samples):
            name, most = secrets.token_hex(8), max(self.max_tokens, 1)
            request = self.new_request(name, self.prompt, most, self.params.priority, shares_prefix)
            self.generations.append(
                Generation(
                    request,
                    self.params,
                    _seed(seed, sample),
                    ends.of(self.params),
                    ends.tokenizer,
                    queue,
                    wants_logits=self.wants_logits,
                )
            )
        return self.generations

    def output(self) -> RequestOutput:
        nothing = (CompletionOutput(text=self._text("")) for _ in range(self.params.n))
        samples = [self._sample(generation) for generation in self.generations] or list(nothing)
        emitted = self.generations[0].prompt_output if self.params.prompt_logprobs is not None else None
        return RequestOutput(
            list(self.prompt),
            samples,
            prompt_logprobs=emitted and emitted.logprobs,
            prompt_top_logprobs=emitted.top_logprobs if emitted and self.params.prompt_logprobs else None,
        )

    def event(self, generation: Generation) -> StreamEvent:
        """What is new of a sample since the last event of it."""
        first, text = generation.emitted, self._written(generation.write())
        generation.emitted = (len(generation.tokens), len(text))
        new = slice(first[0], self.max_tokens)
        return StreamEvent(
            prompt=self.number,
            sample=self.generations.index(generation),
            text=self._text(text[first[1] :]),
            token_ids=generation.tokens[new],
            logprobs=generation.logprobs[new],
            finish_reason=self._reason(generation),
            error=generation.error,
        )

    @property
    def unasked(self) -> list[StreamEvent]:
        """The last events of samples that nothing is asked of."""
        return [
            StreamEvent(self.number, sample, self._text(""), [], [], "length")
            for sample in range(0 if self.samples else self.params.n)
        ]

    @property
    def _needs_prompt_rows(self) -> bool:
        return self.wants_logits or self.params.prompt_logprobs is not None

    def _text(self, text: str) -> str | None:
        return text if self.has_text else None

    def _written(self, text: str) -> str:
        return text if self.max_tokens else ""

    def _reason(self, generation: Generation) -> FinishReason | None:
        """Where no token is asked, the one that was computed for the prompt's sake ends nothing."""
        return "length" if not self.max_tokens and generation.finish_reason == "stop" else generation.finish_reason

    def _sample(self, generation: Generation) -> CompletionOutput:
        most = slice(None, self.max_tokens)
        reason = self._reason(generation)
        assert reason is not None
        return CompletionOutput(
            generation.tokens[most],
            generation.logprobs[most],
            generation.top_logprobs[most] if self.params.logprobs else None,
            reason,
            self._text(self._written(generation.text)),
            generation.error,
        )


def _seed(seed: int, sample: int) -> int:
    """Of one of several samples; the first is that of a single one."""
    return zlib.crc32(f"{seed} {sample}".encode()) if sample else seed % 2**32
