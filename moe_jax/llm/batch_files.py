"""Batch files: a file of prompts in, a file of results out, resumable.

Input: one JSON object a line, with `prompt` (a text or token ids), optionally `id`, and any fields of `SamplingParams`.
Output: one line for each input line, in the same order. Until all results are there, they are kept in a journal next to
the output. A run that was killed resumes from the journal and decodes no finished prompt again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import IO, Any, Self

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.llm import LLM
from moe_jax.llm.request_group import RequestGroup

Entry = dict[str, Any]
"""JSON object of one line."""
PARAMETERS = {field.name for field in fields(SamplingParams)}


def check_paths(source: Path, output: Path) -> None:
    """Check the paths of a batch file and its results.

    Raises:
      RequestError: the input does not exist, the directory of the output does not exist, or the output exists.
    """
    if not source.is_file():
        raise RequestError(f"there is no file {source}: give one with a JSON object on each line")
    if output.exists():
        raise RequestError(f"{output} exists already, and is complete: move it away, or give another name")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"cannot write {output}: there is no directory {output.parent}")


def generate_file(
    llm: LLM,
    source: Path,
    output: Path,
    defaults: SamplingParams,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Continue every prompt of a file. Return the number of lines that could not be served.

    The result of a line that could not be served has an `error` in place of samples.

    Args:
      llm: the engine.
      source: file of prompts.
      output: file for the results.
      defaults: sampling parameters for the fields that a line leaves out.
      on_progress: called after each result with the number of results and the number of lines.

    Raises:
      RequestError: see `check_paths`; or the journal belongs to another input, or to other parameters.
    """
    check_paths(source, output)
    lines = [line for line in source.read_bytes().split(b"\n") if line.strip()]
    journal_path = output.with_name(output.name + ".partial")
    with Journal(journal_path, _fingerprint(llm, lines, defaults)) as journal:
        on_progress(len(journal.results), len(lines))
        for number, result in _results(llm, lines, defaults, journal.results):
            journal.add(number, result)
            on_progress(len(journal.results), len(lines))
        unfinished = output.with_name(output.name + ".unfinished")
        unfinished.write_text("".join(json.dumps(journal.results[number]) + "\n" for number in range(len(lines))))
        unfinished.replace(output)
    journal_path.unlink()
    return sum("error" in result for result in journal.results.values())


def _results(
    llm: LLM, lines: list[bytes], defaults: SamplingParams, finished: Mapping[int, Entry]
) -> Iterator[tuple[int, Entry]]:
    """Yield the number and result of each line that is not finished, in the order of completion."""
    request_groups: list[RequestGroup] = []
    ids: dict[int, Any] = {}
    for number in sorted(set(range(len(lines))) - finished.keys()):
        try:
            request = _parse(lines[number])
            ids[number] = request.pop("id", number)
            (group,) = llm.request_groups([request.pop("prompt")], _params(request, defaults))
            request_groups.append(replace(group, number=number))
        except RequestError as error:
            reason = str(error).replace("prompt 0", "the prompt", 1)
            yield number, {"id": ids.get(number, number), "error": reason}
    for group in llm.engine_loop.finished(request_groups):
        yield group.number, _result(group, ids[group.number])


def _parse(line: bytes) -> Entry:
    try:
        request = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not valid JSON: {error}") from error
    if not isinstance(request, dict) or "prompt" not in request:
        raise RequestError("each line must be a JSON object with a prompt")
    return request


def _params(request: Entry, defaults: SamplingParams) -> SamplingParams:
    if unknown := sorted(request.keys() - PARAMETERS):
        raise RequestError(f"unknown fields {unknown}: besides prompt and id there are {', '.join(sorted(PARAMETERS))}")
    return replace(defaults, **request)


def _result(group: RequestGroup, id: Any) -> Entry:
    output = group.output()
    result = {"id": id, "samples": [asdict(completion) for completion in output.outputs]}
    if output.prompt_logprobs is not None:
        result |= {"prompt_logprobs": output.prompt_logprobs, "prompt_top_logprobs": output.prompt_top_logprobs}
    return result


def _fingerprint(llm: LLM, lines: list[bytes], defaults: SamplingParams) -> str:
    return hashlib.sha256(b"\n".join([llm.identity.encode(), repr(defaults).encode(), *lines])).hexdigest()


class Journal:
    """File of results in the order of completion; each result is flushed before the next is added."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        """`fingerprint` identifies the input, the model and the parameters that the results belong to."""
        self._path, self._fingerprint = path, fingerprint
        self.results: dict[int, Entry] = {}
        """Results by line number."""

    def __enter__(self) -> Self:
        """Open the journal, lock it, and read its results.

        Raises:
          RequestError: the journal has another fingerprint or is damaged, or another run has locked it.
        """
        self._file = self._path.open("a+b")
        try:
            _lock(self._file)
        except BlockingIOError as error:
            self._file.close()
            raise RequestError(f"another run writes to {self._path}: wait for it, or give another output") from error
        self._file.seek(0)
        complete, _, _ = self._file.read().rpartition(b"\n")  # a kill may leave an incomplete last line
        entries = [self._read(number, line) for number, line in enumerate(complete.splitlines(), 1)]
        if entries and entries[0] != self._header:
            self._file.close()
            raise RequestError(
                f"{self._path} belongs to another input, model, dtype or length, or to other parameters: resume with "
                "those, or delete it to start again"
            )
        self._file.truncate(len(complete) + 1 if entries else 0)
        if not entries:
            self._write(self._header)
        self.results = {entry["number"]: entry["result"] for entry in entries[1:]}
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, number: int, result: Entry) -> None:
        """Add the result of a line."""
        self.results[number] = result
        self._write({"number": number, "result": result})

    @property
    def _header(self) -> Entry:
        return {"fingerprint": self._fingerprint}

    def _read(self, number: int, line: bytes) -> Entry:
        try:
            return json.loads(line)
        except ValueError as error:
            self._file.close()
            raise RequestError(f"{self._path} is damaged at line {number}: delete it to start again") from error

    def _write(self, entry: Entry) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()


def _lock(file: IO[bytes]) -> None:
    """Lock a file until it is closed, or the process ends.

    Raises:
      BlockingIOError: another process has locked the file.
      RequestError: the platform has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RequestError("files of prompts need Linux or macOS: on Windows, use WSL 2") from error
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
