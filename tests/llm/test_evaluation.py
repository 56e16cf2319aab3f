"""Perplexity and exact matches equal those computed from logits and answers by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import LLM, SamplingParams, cli
from moe_jax.errors import RequestError
from moe_jax.llm.evaluation import Example, Perplexity, answer, exact_match, perplexity, read_examples, windows
from moe_jax.llm.text_files import read_text

TEXT = "12+34=46" * 20


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(mesh="expert=2", dtype="float32", max_batch_size=8)


@given(st.integers(2, 300), st.integers(2, 60), st.data())
def test_windows_score_each_token_once_with_enough_context(tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    parts = list(windows(tokens, length, stride))
    assert [place for part in parts for place in range(part.scored, part.end)] == list(range(1, tokens))
    assert parts[0].start == 0
    for part in parts:
        assert part.end - part.start <= length
        assert part.start < part.scored
    assert all(part.scored - part.start >= length - stride for part in parts[1:])


@pytest.mark.parametrize(("length", "stride"), [(None, None), (64, 1), (2, 1), (10, 7)])
def test_perplexity_is_that_of_the_logits(llm: LLM, length: int | None, stride: int | None) -> None:
    found = perplexity(llm, TEXT, length=length, stride=stride)
    assert llm.tokenizer
    tokens, losses = llm.tokenizer.encode(TEXT).ids, []
    for part in windows(len(tokens), length or 64, stride or 32):
        (logits,) = llm.logits([tokens[part.start : part.end]])
        rows = jax.nn.log_softmax(logits)[part.scored - part.start - 1 : -1]
        losses += (-rows[np.arange(len(rows)), tokens[part.scored : part.end]]).tolist()
    assert len(losses) == found.tokens == len(tokens) - 1
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    assert found.bits_per_byte == pytest.approx(np.sum(losses) / np.log(2) / len(TEXT), rel=1e-4)


def test_bad_windows_and_texts_are_refused(llm: LLM) -> None:
    for length, stride in ((1, 1), (65, 1), (10, 10), (10, 0)):
        with pytest.raises(RequestError, match="windows must have 2 to 64 tokens and a smaller stride"):
            perplexity(llm, TEXT, length=length, stride=stride)
    with pytest.raises(RequestError, match="the text has 1 tokens"):
        perplexity(llm, "1")
    for text in ("1+1=two", "\ud800"):
        with pytest.raises(RequestError, match=r"the text, '.*', has text that the tokenizer has no token for"):
            perplexity(llm, text)


def test_answers_are_matched_exactly(llm: LLM) -> None:
    examples = [Example("1+1=", "2"), Example("12+34=", " 46\n"), Example("2+2=", "5")]
    answers = answer(llm, examples, SamplingParams(temperature=0))
    assert answers == ["2", "46", "4"]
    assert exact_match(examples, answers) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "line",
    [b"[]", b"{}", b'{"prompt": "1"}', b'{"prompt": 1, "answer": "2"}', b"x", b"[" * 10**5, b"\xff", b'"\xe9"',
     b'{"prompt": "\\ud800", "answer": "2"}'],
)  # fmt: skip
def test_bad_examples_name_the_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "examples.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "1", "answer": "2"}\r\n\r' + line)
    with pytest.raises(RequestError, match=r"examples.jsonl, line 3: .*; expected an object such as"):
        read_examples(tmp_path / "examples.jsonl")


@pytest.mark.parametrize("answer", ["a\u2028b", "a\x85b", "\u00e9", "a\nb"])
def test_lines_end_where_json_says(tmp_path: Path, answer: str) -> None:
    """Other programs write these characters as they are inside a string."""
    written = json.dumps({"prompt": "1", "answer": answer, "id": 7}, ensure_ascii=False)
    (tmp_path / "examples.jsonl").write_text(f"{written}\n{written}", encoding="utf-8")
    assert read_examples(tmp_path / "examples.jsonl") == [Example("1", answer)] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xe9\xe8", "is not in UTF-8 at byte 0"),
        (b"12+3=\xff", "is not in UTF-8 at byte 5"),
        ("1+1=2".encode("utf-16"), "is in UTF-16"),
        (b"\x1f\x8b\x08", "is compressed"),
    ],
)
def test_texts_that_are_not_in_utf_8_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(RequestError, match=words):
        read_text(tmp_path / "text")


def test_a_text_keeps_its_characters(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa\r\nb\xe2\x80\xa8c\rd")
    assert read_text(tmp_path / "text") == "a\r\nb\u2028c\rd"


def test_perplexity_beyond_the_largest_number_is_infinite() -> None:
    assert Perplexity(tokens=1, bytes=1, loss=1e4).perplexity == math.inf


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moe-jax", "-q", "eval", "--mesh", "expert=2", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_eval_prints_both_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    _, out, _ = run(monkeypatch, capsys, "--text", str(tmp_path / "text"), "--json")
    assert json.loads(out).keys() == {"perplexity", "bits_per_byte", "tokens", "bytes", "loss"}
    (tmp_path / "answers").write_text(json.dumps({"prompt": "1+1=", "answer": "2"}))
    _, out, _ = run(monkeypatch, capsys, "--answers", str(tmp_path / "answers"))
    assert out == "exact match 100.00%, 1 of 1\n"
    status, _, error = run(monkeypatch, capsys)
    assert (status, error) == (1, "moe-jax: give --text FILE for perplexity, or --answers FILE for exact matches\n")
