"""Interleaved timing of compiled programs, so that a disturbance affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled

from moe_jax.analysis.census import Collective, collectives, count, sent_bytes


@dataclass(frozen=True)
class Times:
    """Timed repeats of one variant."""

    seconds: np.ndarray
    """Seconds of each repeat."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float((high - low) / 2 / self.median)

    def as_dict(self) -> dict[str, float]:
        return {"ms": self.median * 1e3, "spread": self.spread}


@dataclass(frozen=True)
class Program:
    """A compiled program and its arguments."""

    compiled: Compiled
    args: tuple[Any, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], *args: Any) -> Program:
        return cls(jax.jit(function).lower(*args).compile(), args)

    def __call__(self) -> Any:
        return self.compiled(*self.args)

    @cached_property
    def collectives(self) -> list[Collective]:
        return collectives(self.compiled.as_text() or "")


def interleaved(variants: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Time the variants in turns, `repeats` calls each, after one warm-up call."""
    for variant in variants.values():
        jax.block_until_ready(variant())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = time.perf_counter()
            jax.block_until_ready(variant())
            seconds[name].append(time.perf_counter() - began)
    return {name: Times(np.array(values)) for name, values in seconds.items()}


def measure_programs(programs: Mapping[str, Program], repeats: int) -> dict[str, dict[str, Any]]:
    """Time, number of collectives of each kind, and bytes that each device sends, of each program."""
    times = interleaved(programs, repeats)
    return {name: {**times[name].as_dict(), **traffic(program.collectives)} for name, program in programs.items()}


def traffic(found: Sequence[Collective]) -> dict[str, Any]:
    """Number of collectives of each kind, and the bytes that each device sends."""
    return {"collectives": dict(count(found)), "sent_bytes": sent_bytes(found)}


def format_time(variant: Mapping[str, Any]) -> str:
    """Format milliseconds and their spread."""
    return f"{variant['ms']:.3f} ±{variant['spread']:4.0%}"
