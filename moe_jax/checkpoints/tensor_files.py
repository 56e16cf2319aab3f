"""The safetensors files of a checkpoint directory, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from moe_jax.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class TensorFiles:
    """All tensors of a directory, by name: one file, or several with an index. A context manager.

    Raises:
      CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}
        with ExitStack() as on_error:
            on_error.push(self._open_files)
            index = self._index(directory)
            for name in sorted(set(index.values())) if index else [SINGLE]:
                file = self._open(directory / name)
                self._file_of |= dict.fromkeys(file.keys(), file)
            if lost := sorted(set(index) - set(self._file_of)):
                raise CheckpointError(f"{directory / INDEX} names tensors that no file holds: {', '.join(lost[:8])}")
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Each tensor's shape and dtype, the latter as safetensors writes it."""
        slices = {name: file.get_slice(name) for name, file in self._file_of.items()}
        return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}

    def read(self, name: str) -> np.ndarray:
        return self._file_of[name].get_tensor(name)

    def _index(self, directory: Path) -> dict[str, str]:
        path = directory / INDEX
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no index of safetensors files: {error}") from error

    def _open(self, path: Path) -> Any:
        try:
            return self._open_files.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError as error:
            raise CheckpointError(f"weights file {path} is missing: copy it there") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"weights file {path} is damaged ({error}): copy it again") from error
