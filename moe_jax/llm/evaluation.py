"""Quality of a model on a user's data: perplexity of a text, and exact matches of answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from tqdm import tqdm

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.llm import LLM
from moe_jax.llm.prompts import encode_text
from moe_jax.llm.text_files import read_json_lines

WINDOWS_AT_ONCE = 64
"""Windows of a text that are scored in one call."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text."""

    tokens: int
    """Tokens that were scored: all but the first."""
    bytes: int
    """Bytes of the text in UTF-8."""
    loss: float
    """Mean negative log-likelihood of a token, in nats."""

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits of all scored tokens over the bytes of the text, which does not depend on the tokenizer."""
        return self.loss * self.tokens / math.log(2) / self.bytes


class TextWindow(NamedTuple):
    """Part of a text, as places of tokens."""

    start: int
    end: int
    scored: int
    """Place of the first token that is scored; the tokens before it are context."""


def windows(tokens: int, length: int, stride: int) -> Iterator[TextWindow]:
    """Divide a text into windows, so that each token but the first is scored once.

    A window begins `stride` tokens after the one before it: a token has at least `length - stride` tokens of context,
    except in the first window.
    """
    scored = 1
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        if end > scored:
            yield TextWindow(start, end, scored)
        scored = end


def perplexity(
    llm: LLM, text: str, *, length: int | None = None, stride: int | None = None, progress: bool = False
) -> Perplexity:
    """Return the perplexity of a text, scored in overlapping windows.

    Args:
      length: tokens of a window; by default `llm.max_length`.
      stride: tokens from one window to the next; by default half a window.
      progress: show a progress bar.

    Raises:
      RequestError: the text has fewer than two tokens, or characters that the tokenizer has no token for; a size of the
        windows does not fit; or the model's logits are not finite.
    """
    length = llm.max_length if length is None else length
    stride = max(length // 2, 1) if stride is None else stride
    if not (2 <= length <= llm.max_length and 1 <= stride < length):
        raise RequestError(
            f"windows must have 2 to {llm.max_length} tokens and a smaller stride, at least 1; got {length} and "
            f"{stride}: leave them out"
        )
    if llm.tokenizer is None:
        raise RequestError("the checkpoint has no tokenizer.json, which a text needs: copy it there")
    tokens = encode_text("the text", text, llm.tokenizer)
    if len(tokens) < 2:
        raise RequestError(f"the text has {len(tokens)} tokens: give one with at least 2")
    parts, total = list(windows(len(tokens), length, stride)), 0.0
    with tqdm(total=len(parts), desc="scoring", unit=" windows", disable=not progress, leave=False) as bar:
        for first in range(0, len(parts), WINDOWS_AT_ONCE):
            group = parts[first : first + WINDOWS_AT_ONCE]
            scores = llm.score([tokens[part.start : part.end] for part in group])
            total -= sum(float(each[part.scored - part.end :].sum()) for part, each in zip(group, scores, strict=True))
            bar.update(len(group))
    if math.isnan(total):
        raise RequestError("the model's logits are not finite: check its weights, or use a wider dtype")
    scored = len(tokens) - 1
    return Perplexity(scored, len(text.encode()), total / scored)


@dataclass(frozen=True)
class Example:
    """Prompt with the right answer."""

    prompt: str
    answer: str


def read_examples(path: Path) -> list[Example]:
    """Read examples from a file with a JSON object `{"prompt": ..., "answer": ...}` on each line.

    Raises:
      RequestError: a line is no such object, or there is none.
    """
    examples = []
    for number, line in enumerate(read_json_lines(path), 1):
        if line.strip():
            try:
                examples.append(msgspec.json.decode(line, type=Example))
            except (ValueError, RecursionError) as error:  # errors of msgspec and of UTF-8 are ValueErrors
                raise RequestError(
                    f'{path}, line {number}: {error}; expected an object such as {{"prompt": "1+1=", "answer": "2"}}'
                ) from error
    if not examples:
        raise RequestError(f"{path} has no lines: give one with a prompt and its answer on each line")
    return examples


def answer(llm: LLM, examples: Sequence[Example], params: SamplingParams, *, progress: bool = False) -> list[str]:
    """Return the model's answers, without white space around them.

    Raises:
      RequestError: a prompt cannot be served, or failed.
    """
    outputs = llm.generate([example.prompt for example in examples], params, progress=progress)
    for number, output in enumerate(outputs):
        if output.error:
            raise RequestError(f"prompt {number} failed: {output.error}")
    return [(output.text or "").strip() for output in outputs]


def exact_match(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """Return the share of answers that equal the right one, white space around it aside."""
    right = sum(example.answer.strip() == given for example, given in zip(examples, answers, strict=True))
    return right / len(examples)
