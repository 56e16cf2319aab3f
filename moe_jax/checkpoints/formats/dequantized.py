"""The weights of a quantized checkpoint, dequantized one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from moe_jax.checkpoints.formats.eight_bits import EightBits
from moe_jax.checkpoints.formats.scheme import WEIGHT, Companion, Scheme, Shapes, Stored, Tensors
from moe_jax.checkpoints.tensor_files import ALL, EIGHT_BITS
from moe_jax.errors import CheckpointError

MAX_PROBLEMS_SHOWN = 20
UNREAD = ("input_scale", "output_scale", "input_global_scale", "k_scale", "v_scale", "q_scale", "kv_scale")
"""Ends of the names of tensors for quantized activations and caches. The decoder computes with both exact."""


class DequantizedTensors:
    """The tensors of a quantized checkpoint, dequantized to float32.

    Raises:
      CheckpointError: scales or other companions of quantized weights are missing, or have a wrong shape or dtype.
    """

    def __init__(self, files: Tensors, schemes: Sequence[Scheme]) -> None:
        self._files, self._found = files, files.shapes()
        self._schemes: dict[str, Scheme] = {}
        problems: dict[str, list[str]] = {}
        for weight, scheme in self._quantized(schemes):
            if problems.get(weight, [""]):  # no scheme, or none that fits
                self._schemes[weight], problems[weight] = scheme, _problems(self._stored(weight), scheme)
        _refuse(list(chain.from_iterable(problems.values())))
        self._shapes = {name: scheme.weight_shape(self._stored(name)) for name, scheme in self._schemes.items()}
        self._hidden = set(chain.from_iterable(map(self._parts, self._schemes))) - self._schemes.keys()

    def shapes(self) -> Shapes:
        """Return the shape and the dtype of each tensor after dequantization; scales are left out."""
        others = {
            name: found for name, found in self._found.items() if name not in self._hidden and not name.endswith(UNREAD)
        }
        return others | {name: (shape, "F32") for name, shape in self._shapes.items()}

    def read(self, name: str, part: slice = ALL) -> np.ndarray:
        """Return one tensor, dequantized, or a part of its first dimension."""
        scheme = self._schemes.get(name)
        if scheme is None:
            return self._files.read(name, part)
        experts, *matrix = self._shapes[name]
        if len(matrix) < 2:
            return scheme.decode(self._stored(name))[part]
        return scheme.decode(replace(self._stored(name), experts=experts, part=part))

    def all_in_eight_bits(self, names: Iterable[str]) -> bool:
        """Return True if all these tensors are numbers in float8 with scales."""
        return all(
            isinstance(each := self._schemes.get(name), EightBits) and each.dtype == EIGHT_BITS for name in names
        )

    def numbers(self, name: str, part: slice = ALL) -> np.ndarray:
        """Return a weight in float8 as it is in the file, its bits viewed as int8."""
        return self._files.read(name, part).view(np.int8)

    def scales(self, name: str, part: slice = ALL) -> np.ndarray:
        """Return the scale of each number of a weight in float8, in the shape of the weight."""
        scheme = self._schemes[name]
        assert isinstance(scheme, EightBits)
        return np.broadcast_to(scheme.spread_scales(self._stored(name)), self._shapes[name])[part]

    def _parts(self, weight: str) -> Iterator[str]:
        """Yield the names of the tensors of a quantized weight."""
        scheme, stored = self._schemes[weight], self._stored(weight)
        yield from map(stored.name, (scheme.codes, *scheme.companions(self._shapes[weight])))

    def _stored(self, weight: str) -> Stored:
        return Stored(weight, self._files, self._found)

    def _quantized(self, schemes: Sequence[Scheme]) -> Iterator[tuple[str, Scheme]]:
        """Yield the name and scheme of each quantized weight.

        A scale in float8 has the dtype of codes; it is told apart by its name, which is that of a companion.
        """
        for scheme in schemes:
            suffix = scheme.codes.removeprefix("{weight}").removeprefix("{module}")
            ending = WEIGHT if scheme.codes.startswith("{module}") else ""
            for name, (_, dtype) in self._found.items():
                if dtype == scheme.dtype and name.endswith(suffix) and not _is_companion(name):
                    yield name.removesuffix(suffix) + ending, scheme


def _is_companion(name: str) -> bool:
    return name.endswith(("_scale", "_scale_inv", "_scale_2", "_scales", "absmax", ".qzeros", "_zero_point", "_nf4"))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - MAX_PROBLEMS_SHOWN
        raise CheckpointError(
            "quantized weights lack scales, or have wrong ones:\n  "
            + "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
        )


def _problems(stored: Stored, scheme: Scheme) -> list[str]:
    try:
        companions = scheme.companions(scheme.weight_shape(stored))
    except ValueError as error:
        return [f"{stored.weight}: {error}"]
    return [problem for each in companions.items() for problem in _problem(stored, *each)]


def _problem(stored: Stored, template: str, expected: Companion) -> list[str]:
    """Return what is wrong with a companion. Dimensions of size 1 do not count."""
    name = stored.name(template)
    if name not in stored.found:
        return [] if expected.is_optional else [f"{name} is missing"]
    shape, dtype = stored.found[name]
    if dtype not in expected.dtypes:
        return [f"{name} has dtype {dtype}, expected one of {', '.join(expected.dtypes)}"]
    if [size for size in shape if size != 1] != [size for size in expected.shape if size != 1]:
        return [f"{name} has shape {list(shape)}, expected {list(expected.shape)}"]
    return []
