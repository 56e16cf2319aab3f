"""Batch files: a file of prompts in, a file of results out, resumable.

Input: one JSON object a line, with `prompt` (a text or token ids), optionally `id` (any JSON value, which comes back as
it was written), and any fields of `SamplingParams`.
Output: one line for each input line, in the same order. Until all results are there, they are kept in a journal next to
the output. A run that was killed resumes from the journal and decodes no finished prompt again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.journal import Journal, Result
from moe_jax.llm.llm import LLM
from moe_jax.llm.request_group import RequestGroup
from moe_jax.llm.text_files import read_json_lines

Entry = dict[str, Any]
"""JSON object of one line."""


class FileReport(NamedTuple):
    """Numbers of lines of a batch file."""

    lines: int
    failed: int
    """Lines that could not be served, or whose samples ended in an error."""


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
) -> FileReport:
    """Continue every prompt of a file.

    The result of a line that could not be served has an `error` in place of samples.

    Args:
      llm: the engine.
      source: file of prompts.
      output: file for the results.
      defaults: sampling parameters for the fields that a line leaves out.
      on_progress: called after each result with the number of results and the number of lines.

    Raises:
      RequestError: see `check_paths` and `read_json_lines`; or the journal belongs to another input, or to other
        parameters.
    """
    check_paths(source, output)
    lines = [line for line in read_json_lines(source) if line.strip()]
    journal_path = output.with_name(output.name + ".partial")
    with Journal(journal_path, _fingerprint(llm, lines, defaults), len(lines)) as journal:
        on_progress(len(journal.results), len(lines))
        for result in _results(llm, lines, defaults, journal.results):
            journal.add(result)
            on_progress(len(journal.results), len(lines))
        journal.write_output(output)
    journal_path.unlink()
    return FileReport(len(lines), sum(result.has_failed for result in journal.results.values()))


def _results(
    llm: LLM, lines: list[bytes], defaults: SamplingParams, finished: Mapping[int, Result]
) -> Iterator[Result]:
    """Yield the result of each line that is not finished, in the order of completion."""
    request_groups: list[RequestGroup] = []
    ids: dict[int, msgspec.Raw] = {}
    for number in sorted(set(range(len(lines))) - finished.keys()):
        ids[number] = msgspec.Raw(str(number).encode())
        try:
            fields = _parse(lines[number])
            ids[number] = fields.pop("id", ids[number])
            request = {name: msgspec.json.decode(value) for name, value in fields.items()}
            (group,) = llm.request_groups([request.pop("prompt")], _params(request, defaults))
            request_groups.append(replace(group, number=number))
        except (RequestError, msgspec.MsgspecError, RecursionError) as error:
            reason = str(error).replace("prompt 0", "the prompt", 1)
            yield _result(number, {"id": ids[number], "error": reason}, has_failed=True)
    for group in llm.engine_loop.finished(request_groups):
        yield _group_result(group, ids[group.number])


def _parse(line: bytes) -> dict[str, msgspec.Raw]:
    """Return the fields of a line as they are written: an `id` comes back exactly."""
    try:
        line.decode()
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        fields = {}
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the line is not valid JSON: {error}") from error
    if "prompt" not in fields:
        raise RequestError("each line must be a JSON object with a prompt")
    return fields


def _params(request: Entry, defaults: SamplingParams) -> SamplingParams:
    if unknown := sorted(request.keys() - PARAMETERS):
        raise RequestError(f"unknown fields {unknown}: besides prompt and id there are {', '.join(sorted(PARAMETERS))}")
    return replace(defaults, **request)


def _group_result(group: RequestGroup, id: msgspec.Raw) -> Result:
    output = group.output()
    result = {"id": id, "samples": [asdict(completion) for completion in output.outputs]}
    if output.prompt_logprobs is not None:
        result |= {"prompt_logprobs": output.prompt_logprobs, "prompt_top_logprobs": output.prompt_top_logprobs}
    return _result(group.number, result, has_failed=any(completion.error for completion in output.outputs))


def _result(number: int, result: Entry, *, has_failed: bool) -> Result:
    return Result(number, has_failed, msgspec.Raw(msgspec.json.encode(result)))


def _fingerprint(llm: LLM, lines: list[bytes], defaults: SamplingParams) -> str:
    return hashlib.sha256(b"\n".join([llm.identity.encode(), repr(defaults).encode(), *lines])).hexdigest()
