"""One prompt of a call: the samples that are generated for it, and what is told of them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from moe_jax.engine import Generation, News
from moe_jax.requests import RequestOutput, Sample, SamplingParams, StreamEvent
from moe_jax.scheduler import Request


@dataclass(frozen=True)
class Ends:
    """What a checkpoint says of texts."""

    tokenizer: Tokenizer | None
    end_ids: frozenset[int]
    """Tokens that end a text."""

    def of(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end a request of these parameters."""
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.end_ids)


@dataclass(eq=False)
class Job:
    number: int
    """Its place in the call."""
    prompt: list[int]
    params: SamplingParams
    most_tokens: int
    """As many as `max_tokens` and the cache allow."""
    has_text: bool
    """Whether there is a tokenizer."""
    wants_logits: bool = False
    generations: list[Generation] = field(default_factory=list)
    """The samples, once it has begun."""

    @property
    def samples(self) -> int:
        """Generations that it needs; none where nothing is asked."""
        return self.params.n if self.most_tokens or self._tells_prompt else 0

    def begin(self, ends: Ends, news: News) -> list[Generation]:
        """The generations to run, which report to `news`."""
        seed = secrets.randbits(32) if self.params.seed is None else self.params.seed
        # What is told of a prompt is computed with it, and penalties look at tokens that the devices have been sent.
        shares_prefix = not (self._tells_prompt or self.params.penalises)
        for sample in range(self.samples):
            name, most = secrets.token_hex(8), max(self.most_tokens, 1)
            request = Request(name, self.prompt, most, self.params.priority, shares_prefix)
            self.generations.append(
                Generation(
                    request,
                    self.params,
                    (seed + sample) % 2**32,
                    ends.of(self.params),
                    ends.tokenizer,
                    news,
                    wants_logits=self.wants_logits,
                )
            )
        return self.generations

    def output(self) -> RequestOutput:
        samples = [self._sample(generation) for generation in self.generations] or [
            Sample(text=self._text(""))
        ] * self.params.n
        told = self.generations[0].told_of_prompt if self.params.prompt_logprobs is not None else None
        return RequestOutput(
            list(self.prompt),
            samples,
            prompt_logprobs=told and told.logprobs,
            prompt_top_logprobs=told.candidates if told and self.params.prompt_logprobs else None,
        )

    def event(self, generation: Generation) -> StreamEvent:
        """What is new of a sample since the last event of it."""
        first, text = generation.told, generation.write()
        generation.told = (len(generation.tokens), len(text))
        return StreamEvent(
            prompt=self.number,
            sample=self.generations.index(generation),
            text=self._text(text[first[1] :]),
            token_ids=generation.tokens[first[0] :],
            logprobs=generation.logprobs[first[0] :],
            finish_reason=generation.finish_reason,
            error=generation.error,
        )

    @property
    def _tells_prompt(self) -> bool:
        return self.wants_logits or self.params.prompt_logprobs is not None

    def _text(self, text: str) -> str | None:
        return text if self.has_text else None

    def _sample(self, generation: Generation) -> Sample:
        most = slice(None, self.most_tokens)
        assert generation.finish_reason is not None
        return Sample(
            generation.tokens[most],
            generation.logprobs[most],
            generation.candidates[most] if self.params.logprobs else None,
            generation.finish_reason if self.most_tokens else "length",
            self._text(generation.text if self.most_tokens else ""),
            generation.error,
        )
