"""Four-bit NormalFloat weights of bitsandbytes (QLoRA, arXiv:2305.14314): 16 numbers, and scales for blocks.

The blocks are of neighbouring numbers of the flat weight. With double quantization the scales are codes too, with
scales of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.checkpoints.formats.codes import unpack
from moe_jax.checkpoints.formats.scheme import Companion, Shape, Stored

HIGH_FIRST = (1, 0)
"""Order of the two codes of a byte."""


@dataclass(frozen=True)
class NF4:
    """Four-bit codes of numbers in a table."""

    nested: bool
    """The scales are quantized too."""
    codes: str = "{weight}"
    dtype: str = "U8"
    scales: str = "{weight}.absmax"
    table: str = "{weight}.quant_map"
    nested_scales: str = "{weight}.nested_absmax"
    nested_table: str = "{weight}.nested_quant_map"
    state: str = "{weight}.quant_state.bitsandbytes__nf4"

    def weight_shape(self, stored: Stored) -> Shape:
        shape = self._state(stored).get("shape")
        size = 2 * int(np.prod(stored.shape(self.codes)))
        if not isinstance(shape, list) or not all(type(each) is int for each in shape) or np.prod(shape) != size:
            raise stored.refuse(self.state, f"has shape {shape}, the weight has {size} numbers")
        return tuple(shape)

    def companions(self, shape: Shape) -> Mapping[str, Companion]:
        blocks = -(-int(np.prod(shape)) // 64)
        expected = {
            self.scales: Companion((blocks,), ("U8",) if self.nested else ("F32",)),
            self.table: Companion((16,), ("F32",)),
        }
        if self.nested:
            expected[self.nested_scales] = Companion((-(-blocks // 256),), ("F32",))
            expected[self.nested_table] = Companion((256,), ("F32",))
        return expected

    def decode(self, stored: Stored) -> np.ndarray:
        codes = unpack(stored.read(self.codes).reshape(-1), 4, order=HIGH_FIRST)
        numbers = stored.read(self.table)[codes]
        scales = np.repeat(self._scales(stored), 64)[: numbers.size]
        return (numbers * scales).reshape(self.weight_shape(stored))

    def _scales(self, stored: Stored) -> np.ndarray:
        scales = stored.read(self.scales)
        if not self.nested:
            return scales
        nested = np.repeat(stored.read(self.nested_scales), 256)[: scales.size]
        return stored.read(self.nested_table)[scales] * nested + np.float32(self._state(stored)["nested_offset"])

    def _state(self, stored: Stored) -> dict[str, Any]:
        if not stored.has(self.state):
            raise stored.refuse(self.state, "is missing")
        try:
            state = json.loads(stored.read(self.state).tobytes())
            sizes = (state["blocksize"], state.get("nested_blocksize", 256))
            if sizes != (64, 256) or (self.nested and not isinstance(state["nested_offset"], float)):
                raise ValueError(f"blocks of {sizes} where 64 and 256 are supported")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise stored.refuse(self.state, f"is not understood ({error})") from error
        return state
