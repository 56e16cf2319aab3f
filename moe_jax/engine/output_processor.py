"""Turn the outputs of a dispatch into the outputs of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.engine.generation import Generation
from moe_jax.engine.input_builder import PromptRows, SampledSegment
from moe_jax.engine.partial_outputs import StepOutput, TopLogprobs
from moe_jax.programs import SampledTokens
from moe_jax.programs.sampling import NO_TOKEN
from moe_jax.scheduler import Request


def step_outputs(emitted: Any, samples: Sequence[SampledSegment]) -> dict[Request, StepOutput]:
    """Cut the tokens of each request out of a dispatch's `SampledTokens` (NumPy arrays)."""
    tokens, logprobs, counts = (part.tolist() for part in (emitted.tokens, emitted.logprobs, emitted.counts))
    is_emitted = np.arange(emitted.logprobs.shape[1]) < emitted.counts[:, None]
    is_finite = (np.isfinite(emitted.logprobs) | ~is_emitted).all(axis=1).tolist()
    return {
        request: StepOutput(
            tokens[segment][: counts[segment]], logprobs[segment][: counts[segment]], segment, is_finite[segment]
        )
        for request, segment in samples
    }


def top_logprobs(emitted: SampledTokens, output: StepOutput, count: int | None) -> list[TopLogprobs]:
    """Return the `count` most likely tokens at the place of each token of a request."""
    rows = slice(None, len(output.tokens)), slice(None, count)
    tokens, logprobs = (part[output.segment][rows].tolist() for part in (emitted.top_tokens, emitted.top_logprobs))
    return [_by_token(*row) for row in zip(tokens, logprobs, strict=True)]


def add_prompt_output(generation: Generation, prompt: PromptRows, scored: Any) -> None:
    """Add the logits and log-probabilities of some rows of a prompt.

    Rows that were added already, before the request was preempted, are left out.
    """
    output, length = generation.prompt_output, len(generation.request.prompt)
    if generation.logits_rows:
        known = max(length - generation.logits_rows, 0) + sum(map(len, output.logits))
        rows = scored.logits[prompt.rows][max(known - prompt.start, 0) : length - prompt.start]
        output.logits.append(np.array(rows))
    offset = prompt.rows.start - prompt.start
    last = min(prompt.rows.stop, length - 1 + offset)
    for row in range(len(output.logprobs) - 1 + offset, last):
        output.logprobs.append(float(scored.logprobs[row]))
        best = slice(None, generation.params.prompt_logprobs)
        tokens, logprobs = scored.top_tokens[row][best].tolist(), scored.top_logprobs[row][best].tolist()
        output.top_logprobs.append(_by_token(tokens, logprobs))


def _by_token(tokens: list[int], logprobs: list[float]) -> TopLogprobs:
    return {token: logprob for token, logprob in zip(tokens, logprobs, strict=True) if token != NO_TOKEN}
