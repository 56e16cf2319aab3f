"""Stop strings and stop tokens: where a sample ends, and what its text holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from test_detokenizer import SENTENCE_PIECE, tokenizer

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, OutputQueue
from moe_jax.engine.partial_outputs import StepOutput
from moe_jax.scheduler import Request

NEWLINE, WORD, SPACE_WORD = SENTENCE_PIECE.index("<0x0A>"), SENTENCE_PIECE.index("the"), SENTENCE_PIECE.index("▁the")
EMOJI = [SENTENCE_PIECE.index(f"<0x{byte:02X}>") for byte in "😀".encode()]
DOT = SENTENCE_PIECE.index(".")


def generate(
    tokens: Sequence[int],
    *,
    prompt: Sequence[int] = (WORD,),
    stop_ids: Sequence[int] = (),
    at_once: int = 1,
    **params: Any,
) -> tuple[list[int], str | None, str]:
    """Append tokens, `at_once` in a dispatch, until the sample ends. Return its tokens, finish reason and text."""
    sampling = SamplingParams(max_tokens=len(tokens), **params)
    request = Request("one", prompt, len(tokens))
    made = Generation(request, sampling, 0, frozenset(stop_ids), tokenizer("byte_fallback"), OutputQueue())
    for start in range(0, len(tokens), at_once):
        new = list(tokens[start : start + at_once])
        made.append(StepOutput(new, [0.0] * len(new), 0, True))
        made.update_text()
        if made.finish_reason:
            break
    return made.tokens, made.finish_reason, made.text


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        ([NEWLINE] * 5, "\n", ([NEWLINE], "stop", "")),
        ([NEWLINE] * 5, "\n\n", ([NEWLINE] * 2, "stop", "")),
        ([WORD, NEWLINE, *EMOJI, WORD], "\n", ([WORD, NEWLINE], "stop", "the")),
        ([WORD, *EMOJI, WORD], "😀", ([WORD, *EMOJI], "stop", "the")),
        ([DOT, NEWLINE], ".\n", ([DOT, NEWLINE], "stop", "")),
        ([*EMOJI, NEWLINE], "\n", ([*EMOJI, NEWLINE], "stop", "😀")),
        ([NEWLINE, NEWLINE], "the", ([NEWLINE, NEWLINE], "length", "\n\n")),
        ([WORD, SPACE_WORD, DOT], "e th", ([WORD, SPACE_WORD], "stop", "th")),
    ],
)
def test_a_stop_string_stops_with_the_token_that_completes_it(
    tokens: list[int], stop: str, expected: tuple[list[int], str, str], at_once: int
) -> None:
    assert generate(tokens, stop=stop, at_once=at_once) == expected


def test_an_included_stop_string_ends_the_text() -> None:
    assert generate([DOT, NEWLINE, WORD], stop="\n", include_stop_str_in_output=True)[2] == ".\n"


@pytest.mark.parametrize(("include", "text"), [(False, "the."), (True, "the. the")])
def test_the_text_of_a_stop_token_is_left_out_unless_it_is_requested(include: bool, text: str) -> None:
    tokens, reason, found = generate(
        [WORD, DOT, SPACE_WORD, DOT], stop_ids=[SPACE_WORD], include_stop_str_in_output=include
    )
    assert (tokens, reason, found) == ([WORD, DOT, SPACE_WORD], "stop", text)


def test_a_stop_token_completes_no_stop_string() -> None:
    """The text of the stop token is no part of the output, so that it stops nothing."""
    assert generate([WORD, DOT], stop="e.", stop_ids=[DOT], at_once=2) == ([WORD, DOT], "stop", "the")


@pytest.mark.parametrize(("min_tokens", "count"), [(0, 1), (1, 2), (2, 3), (4, 5)])
def test_min_tokens_holds_back_stop_strings(min_tokens: int, count: int) -> None:
    tokens, reason, text = generate([DOT] * 8, stop=".", min_tokens=min_tokens, at_once=3)
    assert (len(tokens), reason, text) == (count, "stop", "." * min_tokens)


@pytest.mark.parametrize(("prompt", "text"), [([WORD], " the."), (["<s>"], "the."), ([NEWLINE], " the.")])
def test_the_text_is_what_follows_the_text_of_the_prompt(prompt: list[int | str], text: str) -> None:
    """The first word keeps its space, which decoders leave out at the beginning of a sequence."""
    whole = tokenizer("byte_fallback")
    ids = [token if isinstance(token, int) else whole.get_vocab()[token] for token in prompt]
    added = whole.decode([*ids, SPACE_WORD, DOT])[len(whole.decode(ids)) :]
    assert generate([SPACE_WORD, DOT], prompt=ids)[2] == added == text


def test_a_prompt_may_end_inside_a_character() -> None:
    assert generate([*EMOJI[2:], DOT], prompt=[WORD, *EMOJI[:2]])[2] == "😀."
