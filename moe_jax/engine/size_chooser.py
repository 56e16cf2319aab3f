"""Choice between a program that is compiled and one that would fit a step better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field

from moe_jax.engine.sizes import StepSize

PATIENCE = 16
"""Steps of one size that run in the program of a larger size before their own program is compiled.

Compiling takes seconds, and rows of padding take milliseconds. Waiting bounds both: a size that is needed once is not
compiled, and a size that is needed often soon is (ski rental).
"""


@dataclass
class SizeChooser:
    """Choose the sizes of steps such that few programs are compiled."""

    compiled: set[tuple[StepSize, Hashable]] = field(default_factory=set)
    """Compiled sizes, each with its variant."""
    _stand_ins: Counter[tuple[StepSize, Hashable]] = field(default_factory=Counter)
    """Number of steps of each size that ran in a larger program."""

    def choose(self, needed: StepSize, variant: Hashable) -> StepSize:
        """Return `needed`, or a larger compiled size in its place.

        Args:
          needed: smallest size that fits the step.
          variant: outputs of the step; each size is compiled once for each variant.
        """
        key = (needed, variant)
        larger = [size for size, outputs in self.compiled if outputs == variant and size.covers(needed)]
        if key not in self.compiled and larger and self._stand_ins[key] < PATIENCE:
            self._stand_ins[key] += 1
            return min(larger, key=lambda size: (size.shape.capacity, size.pages))
        self.compiled.add(key)
        return needed
