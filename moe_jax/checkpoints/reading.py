"""Readers of one device's part of a region: exact weights, or eight-bit numbers with their scales.

Memory bound: a reader holds the arrays that it returns and one tensor of the checkpoint. Where it quantizes, it also
holds the part in float32, with all inputs of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from flax import nnx

from moe_jax.checkpoints.formats import DequantizedTensors, Tensors
from moe_jax.checkpoints.regions import Index, Region
from moe_jax.config import Quantization
from moe_jax.kernels.quantized import QuantizedWeight, quantize
from moe_jax.layers import parameter

Spans: TypeAlias = Sequence[range]
"""The part of a region on one device: a range of indices for each dimension."""


class Reader(Protocol):
    """Reader of a parameter from the files."""

    def read(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        """Return a part of a region: one array for each leaf of the parameter's value."""
        ...


def reader_of(param: nnx.Variable, quantization: Quantization | None, files: Tensors) -> Reader:
    """Return the reader of a parameter.

    Args:
      param: a parameter with an abstract value: `ShapeDtypeStruct`, or a `QuantizedWeight` of these.
    """
    value, inputs = param.get_value(), parameter.inputs_of(param)
    if not isinstance(value, QuantizedWeight):
        return ExactReader(value.dtype, files)
    assert quantization is not None, "a quantized parameter needs a quantization"
    assert inputs is not None, "only matrices are quantized"
    scale_block = tuple(size // scales for size, scales in zip(value.shape, value.scales.shape, strict=True))
    return QuantizedReader(quantization, inputs, scale_block, files)


@dataclass(frozen=True)
class ExactReader:
    """Reader of weights in a floating-point dtype."""

    dtype: np.dtype
    files: Tensors

    def read(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        return (_read_part(region, spans, self.dtype, self.files.read),)


@dataclass(frozen=True)
class QuantizedReader:
    """Reader of eight-bit numbers and their scales.

    Block-quantized files are read as they are if the quantization has blocks. Otherwise the weights are quantized here:
    the scale of an output comes from all its inputs, including those on other devices.
    """

    quantization: Quantization
    inputs: tuple[int, ...]
    """Input dimensions of the parameter, counted from the last."""
    scale_block: tuple[int, ...]
    """The number of neighbouring indices that share a scale, for each dimension."""
    files: Tensors

    def read(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        names = [entry.name for entry in region.entries]
        if self.quantization.block is None or not isinstance(self.files, DequantizedTensors):
            return self._quantized(region, spans)
        if not self.files.all_in_eight_bits(names):
            return self._quantized(region, spans)
        numbers = _read_part(region, spans, np.dtype(np.int8), self.files.numbers)
        scales = _read_part(region, spans, np.dtype(np.float32), self.files.scales)
        return numbers, scales[tuple(slice(None, None, step) for step in self.scale_block)]

    def _quantized(self, region: Region, spans: Spans) -> tuple[np.ndarray, ...]:
        part, all_inputs = [slice(None)] * len(spans), list(spans)
        for dim in self.inputs:
            part[dim], all_inputs[dim] = slice(spans[dim].start, spans[dim].stop), range(region.shape[dim])
        weights = _read_part(region, all_inputs, np.dtype(np.float32), self.files.read)
        with np.errstate(invalid="ignore"):
            numbers, scales = quantize(weights, self.inputs, self.quantization)
        shape = [max(len(span) // step, 1) for span, step in zip(spans, self.scale_block, strict=True)]
        return numbers[tuple(part)], np.broadcast_to(scales, shape)


def _read_part(region: Region, spans: Spans, dtype: np.dtype, read: Callable[..., np.ndarray]) -> np.ndarray:
    """Read a part of a region; the padding of the vocabulary, which no tensor fills, is zero."""
    out = np.zeros([len(span) for span in spans], dtype)
    for entry in region.entries:
        overlap = _overlap(entry.at, spans)
        if overlap is not None:
            source, target = overlap
            with np.errstate(over="ignore"):
                out[target] = entry.read(source, read)
    return out


def _overlap(at: Index, spans: Spans) -> tuple[tuple[slice, ...], Index] | None:
    """Intersect a piece at `at` with `spans`; return the index into the piece and the index into the part."""
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
