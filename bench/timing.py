"""Times variants side by side, so that what disturbs one disturbs the others."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Times:
    """Seconds of one variant's repeats."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, as a share of the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float((high - low) / 2 / self.median)


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Call the variants in turn, `repeats` times each, after one call that compiles and warms up."""
    for variant in variants.values():
        jax.block_until_ready(variant())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = time.perf_counter()
            jax.block_until_ready(variant())
            seconds[name].append(time.perf_counter() - began)
    return {name: Times(np.array(values)) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """What this process measures on."""
    device = jax.devices()[0]
    host = f"{platform.machine()}, {os.cpu_count()} cores"
    return {"device": device.device_kind, "devices": jax.device_count(), "host": host, "jax": jax.__version__}
