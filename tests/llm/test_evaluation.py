"""Perplexity and exact matches equal those computed from logits and answers by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax import LLM, SamplingParams, cli
from moe_jax.errors import RequestError
from moe_jax.llm.evaluation import Example, answer, exact_match, perplexity, read_examples, windows

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


def test_answers_are_matched_exactly(llm: LLM) -> None:
    examples = [Example("1+1=", "2"), Example("12+34=", " 46\n"), Example("2+2=", "5")]
    answers = answer(llm, examples, SamplingParams(temperature=0))
    assert answers == ["2", "46", "4"]
    assert exact_match(examples, answers) == pytest.approx(2 / 3)


@pytest.mark.parametrize("line", ["[]", "{}", '{"prompt": "1"}', '{"prompt": 1, "answer": "2"}', "x", "[" * 10**5])
def test_bad_examples_name_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "examples.jsonl").write_text('\ufeff{"prompt": "1", "answer": "2"}\n\n' + line)
    with pytest.raises(RequestError, match=r"examples.jsonl, line 3: expected an object such as"):
        read_examples(tmp_path / "examples.jsonl")


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
    assert out == "exact match 1.0000, examples 1\n"
    status, _, error = run(monkeypatch, capsys)
    assert (status, error) == (2, "moe-jax: give --text FILE for perplexity, or --answers FILE for exact matches\n")
    (tmp_path / "latin").write_bytes(b"\xe9\xe8")
    _, _, error = run(monkeypatch, capsys, "--text", str(tmp_path / "latin"))
    assert "is not in UTF-8" in error
