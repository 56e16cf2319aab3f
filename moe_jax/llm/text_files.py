"""Text files of users: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
from pathlib import Path

from moe_jax.errors import RequestError

_REMEDIES = {
    b"\x1f\x8b": "is compressed: unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it with unzstd",
    codecs.BOM_UTF16_LE: "is in UTF-16: save it in UTF-8",
    codecs.BOM_UTF16_BE: "is in UTF-16: save it in UTF-8",
}
"""Remedies by the first bytes of a file."""


def read_text(path: Path) -> str:
    """Return the text of a file, with its line endings.

    Raises:
      RequestError: the file is compressed, or not in UTF-8.
    """
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not in UTF-8 at byte {error.start:,}: convert it") from error


def read_json_lines(path: Path) -> list[bytes]:
    """Return the lines of a file of JSON objects, blank ones included. Lines end in LF, CRLF or CR.

    Raises:
      RequestError: the file is compressed, in UTF-16, or one JSON array.
    """
    content = _read(path)
    if content.lstrip().startswith(b"["):
        raise RequestError(f"{path} holds a JSON array: write one object on each line, as `jq -c '.[]'` does")
    return content.splitlines()


def _read(path: Path) -> bytes:
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for start, remedy in _REMEDIES.items():
        if content.startswith(start):
            raise RequestError(f"{path} {remedy}")
    return content
