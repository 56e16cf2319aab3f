"""A file of prompts in, a file of results out, begun again where it was left.

Input: a JSON object on each line, with `prompt` (a text or token ids), `id` if wanted, and any field of
`SamplingParams`. Output: a line for each, in the order of the input. Until all are there, results are kept as they come
in a journal beside the output, which is where a run that was killed goes on: what it holds is not decoded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Self

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.llm import LLM
from moe_jax.llm.request_group import RequestGroup

Line = dict[str, Any]
PARAMETERS = {field.name for field in fields(SamplingParams)}


def check_paths(source: Path, output: Path) -> None:
    """
    Raises:
      RequestError: no such input, no place for the output, or one that is there already.
    """
    if not source.is_file():
        raise RequestError(f"there is no file {source}: give one with a JSON object on each line")
    if output.exists():
        raise RequestError(f"{output} is there already, and complete: move it away, or give another name")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"cannot write {output}: there is no directory {output.parent}")


def generate_file(
    llm: LLM,
    source: Path,
    output: Path,
    defaults: SamplingParams,
    broadcast: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Continue every prompt of a file; of how many lines that cannot be served there is an error only.

    A line that cannot be served gets an `error`; the others run.

    Args:
      defaults: what a line does not say itself.
      tell: called with how many lines there are results for, and how many in all, whenever there are more.

    Raises:
      RequestError: see `check_paths`; or the journal beside the output is of another input, or other parameters.
    """
    check_paths(source, output)
    lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
    journal = output.with_name(output.name + ".partial")
    with _Journal(journal, _fingerprint(llm, lines, defaults)) as kept:
        broadcast(len(kept.results), len(lines))
        for number, result in _results(llm, lines, defaults, kept.results):
            kept.add(number, result)
            broadcast(len(kept.results), len(lines))
        whole = output.with_name(output.name + ".unfinished")
        whole.write_text("".join(json.dumps(kept.results[number]) + "\n" for number in range(len(lines))))
        whole.replace(output)
    journal.unlink()
    return sum("error" in result for result in kept.results.values())


def _results(
    llm: LLM, lines: list[bytes], defaults: SamplingParams, had: Mapping[int, Line]
) -> Iterator[tuple[int, Line]]:
    """Of the lines without one, as they end."""
    request_groups: list[RequestGroup] = []
    ids: dict[int, Any] = {}
    for number in sorted(set(range(len(lines))) - had.keys()):
        try:
            asked = _parsed(lines[number])
            ids[number] = asked.pop("id", number)
            (group,) = llm.request_groups([asked.pop("prompt")], _params(asked, defaults))
            request_groups.append(replace(group, number=number))
        except RequestError as error:
            reason = str(error).replace("prompt 0", "the prompt", 1)
            yield number, {"id": ids.get(number, number), "error": reason}
    for group in llm.finished(request_groups):
        yield group.number, _result(group, ids[group.number])


def _parsed(line: bytes) -> Line:
    try:
        asked = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"this is no JSON: {error}") from error
    if not isinstance(asked, dict) or "prompt" not in asked:
        raise RequestError("each line must be a JSON object with a prompt")
    return asked


def _params(asked: Line, defaults: SamplingParams) -> SamplingParams:
    if unknown := sorted(asked.keys() - PARAMETERS):
        raise RequestError(f"unknown fields {unknown}: besides prompt and id there are {', '.join(sorted(PARAMETERS))}")
    if asked.get("logit_bias") is not None:
        asked["logit_bias"] = _with_ids(asked["logit_bias"])
    return replace(defaults, **asked)


def _with_ids(bias: Any) -> Any:
    """JSON's keys are texts."""
    try:
        return {int(token): value for token, value in bias.items()}
    except (ValueError, AttributeError) as error:
        raise RequestError(f"logit_bias must be an object of token ids and numbers, got {bias!r}") from error


def _result(group: RequestGroup, id: Any) -> Line:
    output = group.output()
    result = {"id": id, "samples": [asdict(sample) for sample in output.samples]}
    if output.prompt_logprobs is not None:
        result |= {"prompt_logprobs": output.prompt_logprobs, "prompt_top_logprobs": output.prompt_top_logprobs}
    return result


def _fingerprint(llm: LLM, lines: list[bytes], defaults: SamplingParams) -> str:
    return hashlib.sha256(b"\n".join([llm.identity.encode(), repr(defaults).encode(), *lines])).hexdigest()


class _Journal:
    """Results in the order of their coming, each on disk before the next."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path, self._fingerprint = path, fingerprint
        self.results: dict[int, Line] = {}
        """By the number of the line."""

    def __enter__(self) -> Self:
        """
        Raises:
          RequestError: it was begun for something else, or another run writes to it.
        """
        self._file = self._path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process
        except BlockingIOError as error:
            self._file.close()
            raise RequestError(f"another run writes to {self._path}: wait for it, or give another output") from error
        self._file.seek(0)
        whole, _, _ = self._file.read().rpartition(b"\n")  # what a kill left of a last line has no end
        entries = [self._read(number, line) for number, line in enumerate(whole.splitlines(), 1)]
        if entries and entries[0] != self._header:
            self._file.close()
            raise RequestError(
                f"{self._path} was begun with another input, model, dtype or length, or other parameters: go on with "
                "those, or delete it to begin anew"
            )
        self._file.truncate(len(whole) + 1 if entries else 0)
        if not entries:
            self._write(self._header)
        self.results = {entry["number"]: entry["result"] for entry in entries[1:]}
        return self

    def _read(self, number: int, line: bytes) -> Line:
        try:
            return json.loads(line)
        except ValueError as error:
            self._file.close()
            raise RequestError(f"{self._path} is damaged at line {number}: delete it to begin anew") from error

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, result: Line) -> None:
        self.results[number] = result
        self._write({"number": number, "result": result})

    @property
    def _header(self) -> Line:
        return {"fingerprint": self._fingerprint}

    def _write(self, entry: Line) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
