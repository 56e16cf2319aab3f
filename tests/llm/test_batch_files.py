"""Batch files: order of results, lines that cannot be served, and resuming after a kill."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import LLM, SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.batch_files import generate_file

GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(mesh="expert=2", dtype="float32", max_batch_size=4, decode_steps=2)


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path: Path, *lines: dict[str, Any] | str) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_results_have_the_order_of_the_input(llm: LLM, paths: tuple[Path, Path]) -> None:
    """Later prompts end earlier."""
    source, output = paths
    write(
        source,
        *({"prompt": f"{n}+{n}=", "id": f"sum {n}", "max_tokens": 20 - n, "ignore_eos": n < 3} for n in range(9)),
    )
    generate_file(llm, source, output, GREEDY)
    results = read(output)
    assert [result["id"] for result in results] == [f"sum {n}" for n in range(9)]
    assert [result["samples"][0]["text"] for result in results[3:]] == [str(2 * n) for n in range(3, 9)]
    assert [len(result["samples"][0]["token_ids"]) for result in results[:3]] == [20, 19, 18]
    assert set(output.parent.iterdir()) == {source, output}


def test_lines_that_cannot_be_served_do_not_stop_the_others(llm: LLM, paths: tuple[Path, Path]) -> None:
    source, output = paths
    write(
        source,
        {"prompt": "1+1="},
        "no json",
        {"text": "1+1="},
        {"prompt": ""},
        {"prompt": "9" * 70, "id": "long"},
        {"prompt": "1+1=", "temprature": 0},
        {"prompt": "1+1=", "top_p": 7},
        {"prompt": "1+1=", "logit_bias": {"x": 1}},
        {"prompt": [1, 10, 1, 99]},
        {"prompt": "1+1=", "max_tokens": 0},
        {"prompt": "2+2=", "logprobs": 2, "prompt_logprobs": 1, "logit_bias": {"4": 100}, "max_tokens": 1},
    )
    generate_file(llm, source, output, GREEDY)
    results = read(output)
    expected = [
        "the line is not valid JSON",
        "must be a JSON object with a prompt",
        "the prompt is empty",
        "the prompt has 70 tokens, a sequence can have 64",
        "unknown fields ['temprature']: besides prompt and id there are",
        "top_p must be above 0 and at most 1, got 7",
        "logit_bias's keys must be token ids",
        "the prompt holds token id 99",
    ]
    for result, message in zip(results[1:9], expected, strict=True):
        assert message in result["error"]
    assert results[4]["id"] == "long"
    assert results[0]["samples"][0]["text"] == "2"
    assert results[9]["samples"][0]["token_ids"] == []
    assert results[10]["samples"][0]["token_ids"] == [4]
    assert len(results[10]["samples"][0]["top_logprobs"][0]) == 2
    assert results[10]["prompt_logprobs"][0] is None


class Killed(Exception):
    pass


def record_started(llm: LLM, patch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the prompts that begin from now on, in order."""
    started: list[tuple[int, ...]] = []
    with llm.engine_loop.paused() as engine:  # after the cancellations of an earlier run
        add = engine.add
        patch.setattr(engine, "add", lambda generation: (started.append(tuple(generation.prompt)), add(generation)))
    return started


def test_a_run_resumes_after_a_kill_without_decoding_twice(
    llm: LLM, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = paths
    write(source, *({"prompt": f"{n}+{n}="} for n in range(12)))

    def kill(done: int, _: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        generate_file(llm, source, output, GREEDY, kill)
    journal = output.with_name("out.jsonl.partial")
    with journal.open("a") as file:
        file.write('{"number": 11, "resu')  # torn
    started = record_started(llm, monkeypatch)
    with pytest.raises(RequestError, match="belongs to another input, model"):
        generate_file(llm, source, output, SamplingParams(temperature=0, max_tokens=7))
    with monkeypatch.context() as patch:
        patch.setattr(llm, "identity", llm.identity.replace("float32", "bfloat16"))
        with pytest.raises(RequestError, match="belongs to another input, model"):
            generate_file(llm, source, output, GREEDY)
    generate_file(llm, source, output, GREEDY)
    assert len(started) == 12 - 5
    assert [result["samples"][0]["text"] for result in read(output)] == [str(2 * n) for n in range(12)]
    assert not journal.exists()
    with pytest.raises(RequestError, match="exists already, and is complete"):
        generate_file(llm, source, output, GREEDY)


def test_a_run_can_be_killed_repeatedly(llm: LLM, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = paths
    prompts = [tuple(group.prompt) for group in llm.request_groups([f"{n}+{n}=" for n in range(12)], GREEDY)]
    write(source, *({"prompt": list(prompt), "id": f"sum {n}"} for n, prompt in enumerate(prompts)), "no json")
    journal = output.with_name("out.jsonl.partial")
    finished: set[int] = set()
    for results, torn in ((4, '{"number": 11, "resu'), (9, '{"number": 10, "result": {"id": "' + "x" * 2000)):

        def kill(done: int, _: int, results: int = results) -> None:
            if done == results:
                raise Killed

        with monkeypatch.context() as patch:
            started = record_started(llm, patch)
            with pytest.raises(Killed):
                generate_file(llm, source, output, GREEDY, kill)
        assert not {prompts[number] for number in finished if number < 12} & set(started)
        numbers = [json.loads(line)["number"] for line in journal.read_text().splitlines()[1:]]
        assert len(set(numbers)) == len(numbers) == results
        assert finished < set(numbers)
        finished = set(numbers)
        with journal.open("a") as file:
            file.write(torn)
    started = record_started(llm, monkeypatch)
    assert generate_file(llm, source, output, GREEDY).failed == 1
    assert sorted(started) == sorted(prompts[number] for number in set(range(12)) - finished)
    results = read(output)
    assert [result["id"] for result in results] == [*(f"sum {n}" for n in range(12)), 12]
    assert [result["samples"][0]["text"] for result in results[:12]] == [str(2 * n) for n in range(12)]


KILLED = """
import os, signal, sys
from pathlib import Path
from moe_jax import LLM, SamplingParams
from moe_jax.llm.batch_files import generate_file

def kill(done, _):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

llm = LLM(mesh="expert=2", dtype="float32", max_batch_size=4, decode_steps=2)
generate_file(llm, Path(sys.argv[1]), Path(sys.argv[2]), SamplingParams(temperature=0, max_tokens=6), kill)
"""


def test_each_result_survives_a_kill(llm: LLM, paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL leaves a process no time to write."""
    source, output = paths
    write(source, *({"prompt": f"{n}+{n}="} for n in range(6)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(output)],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    started = record_started(llm, monkeypatch)
    generate_file(llm, source, output, GREEDY)
    assert len(started) == 6 - 3
    assert [result["samples"][0]["text"] for result in read(output)] == [str(2 * n) for n in range(6)]


def test_an_empty_file_gives_an_empty_file(llm: LLM, paths: tuple[Path, Path]) -> None:
    source, output = paths
    write(source)
    generate_file(llm, source, output, GREEDY)
    assert output.read_text() == ""


def test_lines_that_are_not_text_do_not_stop_the_others(llm: LLM, paths: tuple[Path, Path]) -> None:
    source, output = paths
    source.write_bytes(b'{"prompt": "1+\xff="}\n' + b"[" * 200_000 + b'\n{"prompt": "1+1="}\n')
    assert generate_file(llm, source, output, GREEDY) == (3, 2)
    first, second, third = read(output)
    assert first["error"].startswith("the line is not valid JSON")
    assert second["error"].startswith("each line must be a JSON object")
    assert third["samples"][0]["text"] == "2"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def lines_of_a_journal(llm: LLM, source: Path, output: Path) -> list[str]:
    """Return the journal of a run that was killed after two of three lines."""
    write(source, *({"prompt": f"{n}+{n}="} for n in range(3)))

    def kill(done: int, _: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        generate_file(llm, source, output, GREEDY, kill)
    return output.with_name("out.jsonl.partial").read_text().splitlines()


def test_a_damaged_journal_is_reported(llm: LLM, paths: tuple[Path, Path]) -> None:
    """Damage is any other JSON, any other text, or a field that is missing or changed."""
    source, output = paths
    journal, sound = output.with_name("out.jsonl.partial"), lines_of_a_journal(llm, source, output)
    entry = json.loads(sound[1])
    changed = [{name: value for name, value in entry.items() if name != left_out} for left_out in entry]
    changed += [entry | {name: bad} for name in entry for bad in (None, "x", [], -1, 3, 10**30)]
    changed += [entry | {"extra": 1}, [], 7, "x", None, {}]
    texts = [json.dumps(each) for each in changed] + [sound[1][:-1], "x", "[" * 10**5, '{"number": NaN}', sound[0]]

    def check(text: str) -> None:
        journal.write_text("\n".join([sound[0], text, sound[2], ""]))
        with pytest.raises(RequestError, match=r"partial is damaged at line 2: delete it to start again"):
            generate_file(llm, source, output, GREEDY)
        assert journal.read_text().splitlines()[2] == sound[2], "nothing is lost"

    for text in texts:
        check(text)
    given(JSON_VALUES)(
        settings(max_examples=50, deadline=None, database=None)(lambda value: check(json.dumps(value)))
    )()
    journal.write_text("\n".join([*sound, ""]))
    assert generate_file(llm, source, output, GREEDY) == (3, 0)


IDS = [
    "null", "true", "7", "-0", "1e400", "1.0", "123456789012345678901234567890", "9" * 5000, '"text"', '"\\u00e9\\n"',
    '"\u2028\u0085é😀"', '{"a": [1, {"b": null}], "a": 2}', "[]", "[" * 300 + "]" * 300, '""',
]  # fmt: skip


def test_ids_of_all_forms_come_back_as_they_were_written(llm: LLM, paths: tuple[Path, Path]) -> None:
    source, output = paths
    write(source, *(f'{{"prompt": "1+1=", "id": {each}}}' for each in IDS), f'{{"id": {IDS[-2]}}}')
    assert generate_file(llm, source, output, GREEDY) == (len(IDS) + 1, 1)
    lines = output.read_bytes().decode().split("\n")
    for each, line in zip(IDS, lines, strict=False):
        assert line.startswith(f'{{"id":{each},"samples"')


@pytest.mark.parametrize(
    "content",
    [
        '\ufeff{"prompt": "1+1="}\r\n\r\n  \t\r\n {"prompt": "2+2="} \r\n',
        '{"prompt": "1+1="}\r{"prompt": "2+2="}',
        '{"prompt": "1+1="}\n\n\n{"prompt": "2+2="}',
        '{"prompt": "3+3=", "prompt": "1+1="}\n{"id": "\u2028", "prompt": "2+2="}',
        '{"prompt": "1+1="}\n{"prompt": {"prompt": "2+2="}}',
    ],
)
def test_files_of_editors_are_read(llm: LLM, paths: tuple[Path, Path], content: str) -> None:
    source, output = paths
    source.write_bytes(content.encode())
    assert generate_file(llm, source, output, GREEDY) == (2, 0)
    assert [result["samples"][0]["text"] for result in read(output)] == ["2", "4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"prompt": "1+1="}'), "is compressed: unpack it with gunzip"),
        ('{"prompt": "1+1="}'.encode("utf-16"), "is in UTF-16: save it in UTF-8"),
        (b'[{"prompt": "1+1="}]', "holds a JSON array: write one object on each line"),
    ],
)
def test_files_of_other_kinds_are_refused(llm: LLM, paths: tuple[Path, Path], content: bytes, message: str) -> None:
    source, output = paths
    source.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        generate_file(llm, source, output, GREEDY)
    assert not output.exists()


BAD_LINES = [
    b'{"prompt": "1+1=", "temperature": NaN}', b'{"prompt": "1+1=", "temperature": 1e400}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "1\x001"}', b'{"prompt": "\xff"}', b'{"prompt": "1+1=", "id": "\xff"}', b'{"prompt": "1+1="', b"7",
    b'{"prompt": "1+1=", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": ' + b"[" * 10**5 + b"}", b"{}", b"null", b"'",
    b'{"prompt": "1+1=", "id": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    b'{"prompt": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}", b'{"prompt": [1e1]}', b'{"prompt": null}', b"\x00",
]  # fmt: skip


def test_bad_lines_are_refused_one_by_one(llm: LLM, paths: tuple[Path, Path]) -> None:
    source, output = paths
    source.write_bytes(b"".join(line + b'\n{"prompt": "1+1="}\n' for line in BAD_LINES))
    assert generate_file(llm, source, output, GREEDY) == (2 * len(BAD_LINES), len(BAD_LINES))
    results = read(output)
    assert all(result["error"] for result in results[::2])
    assert all(result["samples"][0]["text"] == "2" for result in results[1::2])


def test_two_runs_cannot_share_a_journal(llm: LLM, paths: tuple[Path, Path]) -> None:
    source, output = paths
    write(source, {"prompt": "1+1="}, {"prompt": "2+2="})

    def run_again(done: int, total: int) -> None:
        with pytest.raises(RequestError, match="another run writes to"):
            generate_file(llm, source, output, GREEDY)

    assert generate_file(llm, source, output, GREEDY, run_again) == (2, 0)
    assert len(output.read_text().splitlines()) == 2


def test_bad_paths_are_refused(llm: LLM, paths: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = paths
    with pytest.raises(RequestError, match="there is no file"):
        generate_file(llm, source, tmp_path / "out", GREEDY)
    write(source)
    with pytest.raises(RequestError, match="there is no directory"):
        generate_file(llm, source, tmp_path / "nowhere" / "out", GREEDY)
