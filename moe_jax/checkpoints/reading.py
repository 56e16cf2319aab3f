"""What a parameter takes from the files of a part of a region: the weights, or numbers in eight bits and scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from flax import nnx

from moe_jax.checkpoints.quantization import DequantizedTensors, Tensors
from moe_jax.checkpoints.weight_mapping import Index, Region
from moe_jax.config import Quantization
from moe_jax.kernels.quantized import QuantizedWeight, quantize
from moe_jax.layers import parameter

Spans: TypeAlias = Sequence[range]
"""Of a region, the part that a device holds, in each dimension."""


class Reader(Protocol):
    def read(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        """The arrays of a parameter's value."""
        ...


def reader_of(param: nnx.Variable, quantization: Quantization | None, files: Tensors) -> Reader:
    """How a parameter of abstract value is read."""
    value, inputs = param.get_value(), parameter.inputs_of(param)
    if not isinstance(value, QuantizedWeight):
        return ExactReader(value.dtype, files)
    assert quantization is not None, "there are parameters in eight bits"
    assert inputs is not None, "only matrices are"
    shared = tuple(size // scales for size, scales in zip(value.shape, value.scales.shape, strict=True))
    return QuantizedReader(quantization, inputs, shared, files)


@dataclass(frozen=True)
class ExactReader:
    """The weights in a dtype."""

    dtype: np.dtype
    files: Tensors

    def read(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        return (_read_part(region, spans, self.dtype, self.files.read),)


@dataclass(frozen=True)
class QuantizedReader:
    """As the files have them where these are in eight bits and a scale is wanted for each block; otherwise rounded to
    numbers of the scale that an output's weights of all inputs give it, those of other devices too."""

    quantization: Quantization
    inputs: tuple[int, ...]
    """Counted from the last dimension."""
    shared: tuple[int, ...]
    """How many neighbours of each dimension share a scale."""
    files: Tensors

    def read(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        names = [entry.name for entry in region.entries]
        if self.quantization.block is None or not isinstance(self.files, DequantizedTensors):
            return self._quantized(region, spans)
        if not self.files.all_in_eight_bits(names):
            return self._quantized(region, spans)
        numbers = _read_part(region, spans, np.dtype(np.int8), self.files.numbers)
        scales = _read_part(region, spans, np.dtype(np.float32), self.files.scales)
        return numbers, scales[tuple(slice(None, None, step) for step in self.shared)]

    def _quantized(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        own, wide = [slice(None)] * len(spans), list(spans)
        for dim in self.inputs:
            own[dim], wide[dim] = slice(spans[dim].start, spans[dim].stop), range(region.shape[dim])
        weights = _read_part(region, wide, np.dtype(np.float32), self.files.read)
        with np.errstate(invalid="ignore"):
            numbers, scales = quantize(weights, self.inputs, self.quantization)
        shape = [max(len(part) // step, 1) for part, step in zip(spans, self.shared, strict=True)]
        return numbers[tuple(own)], np.broadcast_to(scales, shape)


def _read_part(region: Region, spans: Spans, dtype: np.dtype, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The part `spans` of a region; zero where no tensor reaches (padding of the vocabulary)."""
    out = np.zeros([len(span) for span in spans], dtype)
    for entry in region.entries:
        overlap = _overlap(entry.at, spans)
        if overlap is not None:
            source, target = overlap
            with np.errstate(over="ignore"):
                out[target] = entry.to_piece(read(entry.name))[source]
    return out


def _overlap(at: Index, spans: Spans) -> tuple[Index, Index] | None:
    """Where a piece that lies at `at` meets `spans`: the part of the piece, and its place in the spans."""
    source: list[slice] = []
    target: list[int | slice] = []
    for place, span in zip(at, spans, strict=True):
        first, stop = (place, place + 1) if isinstance(place, int) else (place.start, place.stop)
        low, high = max(first, span.start), min(stop, span.stop)
        if low >= high:
            return None
        if isinstance(place, int):
            target.append(low - span.start)
        else:
            source.append(slice(low - first, high - first))
            target.append(slice(low - span.start, high - span.start))
    return tuple(source), tuple(target)
