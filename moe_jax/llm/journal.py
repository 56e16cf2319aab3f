"""Journal of a batch file: the results so far, which survive the end of the process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import IO, Self, TypeVar

import msgspec

from moe_jax.errors import RequestError

SECONDS_BETWEEN_SYNCS = 1.0
"""Seconds of results that a power cut may lose. A kill of the process loses none."""


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """First line: identifies the input, the model and the parameters that the results belong to."""

    fingerprint: str


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """Result of one line of the input."""

    number: int
    has_failed: bool
    line: msgspec.Raw
    """JSON object, as the output will have it."""


T = TypeVar("T", Header, Result)


class Journal:
    """File of results in the order of completion."""

    def __init__(self, path: Path, fingerprint: str, lines: int) -> None:
        """
        Args:
          fingerprint: identifies the input, the model and the parameters.
          lines: number of lines of the input.
        """
        self._path, self._header, self._lines = path, Header(fingerprint), lines
        self._synced = 0.0
        self.results: dict[int, Result] = {}
        """Results by line number."""

    def __enter__(self) -> Self:
        """Open the journal, lock it, and read its results.

        Raises:
          RequestError: the journal has another fingerprint or is damaged, or another run has locked it.
        """
        self._file = self._path.open("a+b")
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, result: Result) -> None:
        """Add the result of a line."""
        self.results[result.number] = result
        self._write(result)

    def write_output(self, path: Path) -> None:
        """Write all results to a new file, in the order of the input. The file appears when it is complete."""
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("wb") as file:
            file.writelines(bytes(self.results[number].line) + b"\n" for number in range(self._lines))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)

    def _read(self) -> None:
        try:
            _lock(self._file)
        except BlockingIOError as error:
            raise RequestError(f"another run writes to {self._path}: wait for it, or give another output") from error
        self._file.seek(0)
        complete, _, _ = self._file.read().rpartition(b"\n")  # a kill may leave an incomplete last line
        first, *others = complete.split(b"\n") if complete else [b""]
        if first and self._decode(1, first, Header) != self._header:
            raise RequestError(
                f"{self._path} belongs to another input, model, dtype or length, or to other parameters: resume with "
                "those, or delete it to start again"
            )
        results = [self._decode(number, line, Result) for number, line in enumerate(others, 2)]
        self.results = {result.number: result for result in results}
        self._file.truncate(len(complete) + 1 if first else 0)
        if not first:
            self._write(self._header)

    def _decode(self, number: int, line: bytes, kind: type[T]) -> T:
        try:
            entry = msgspec.json.decode(line, type=kind)
            is_sound = isinstance(entry, Header) or _is_sound(entry, self._lines)
        except (ValueError, RecursionError):  # errors of msgspec and of UTF-8 are ValueErrors
            is_sound, entry = False, None
        if not is_sound or entry is None:
            raise RequestError(f"{self._path} is damaged at line {number}: delete it to start again")
        return entry

    def _write(self, entry: Header | Result) -> None:
        self._file.write(msgspec.json.encode(entry) + b"\n")
        self._file.flush()
        if time.monotonic() > self._synced + SECONDS_BETWEEN_SYNCS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()


def _is_sound(result: Result, lines: int) -> bool:
    line = bytes(result.line)
    line.decode()
    return 0 <= result.number < lines and line.startswith(b"{")


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
