"""Reader of the safetensors files of a checkpoint directory, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from moe_jax.errors import CheckpointError

EIGHT_BITS = "F8_E4M3"
"""Safetensors name of the dtype float8_e4m3fn."""
UNKNOWN_TO_NUMPY = {EIGHT_BITS: ml_dtypes.float8_e4m3fn, "F8_E8M0": np.uint8}
"""Dtypes that safetensors (0.8) does not read into NumPy. Exponents (E8M0) are read as integers."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


ALL = slice(None)


class TensorFiles:
    """All tensors of a directory, from one file or from several files with an index. A context manager.

    Raises:
      CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """

    def __init__(self, directory: Path) -> None:
        self._open_files = ExitStack()
        with ExitStack() as on_error:
            on_error.push(self._open_files)
            index = self._index(directory)
            self._directory = directory
            files = {name: self._open(directory / name) for name in sorted(set(index.values())) or [SINGLE]}
            stored = {(tensor, name) for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
            if index and (misplaced := sorted({tensor for tensor, _ in stored ^ set(index.items())})):
                raise CheckpointError(
                    f"{directory / INDEX} and the files disagree on where these tensors are: "
                    f"{', '.join(misplaced[:8])} (copy the index and the files again)"
                )
            self._file_of = {tensor: files[name] for tensor, name in stored}
            self._name_of_file = dict(stored)
            on_error.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open_files.close()

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Return the shape and the dtype of each tensor; the dtype has its safetensors name, such as `BF16`."""
        slices = {name: file.get_slice(name) for name, file in self._file_of.items()}
        return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}

    def read(self, name: str, part: slice = ALL) -> np.ndarray:
        """Return one tensor, or a part of its first dimension."""
        view = self._file_of[name].get_slice(name)
        if dtype := UNKNOWN_TO_NUMPY.get(view.get_dtype()):
            return self._read_bytes(name, dtype, part)
        return self._file_of[name].get_tensor(name) if part == ALL else view[part]

    def _read_bytes(self, name: str, dtype: DTypeLike, part: slice) -> np.ndarray:
        """Read a tensor without safetensors' reader."""
        with (self._directory / self._name_of_file[name]).open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(header_size))[name]
            shape, (first, stop) = entry["shape"], entry["data_offsets"]
            if part != ALL:
                rows = range(shape[0])[part]
                size = (stop - first) // shape[0]
                first, stop, shape = first + rows.start * size, first + rows.stop * size, [len(rows), *shape[1:]]
            file.seek(8 + header_size + first)
            return np.frombuffer(file.read(stop - first), dtype).reshape(shape)

    def _index(self, directory: Path) -> dict[str, str]:
        path = directory / INDEX
        if not path.exists():
            return {}
        try:
            index = json.loads(path.read_text())["weight_map"]
            if not all(isinstance(name, str) for name in {**index}.values()):
                raise TypeError("weight_map must name a file for each tensor")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is no index of safetensors files ({error}): copy it again") from error
        return index

    def _open(self, path: Path) -> Any:
        try:
            return self._open_files.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError as error:
            raise CheckpointError(f"weights file {path} is missing: copy it there") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"weights file {path} is damaged ({error}): copy it again") from error
