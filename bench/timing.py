"""Compiled programs, timed side by side, so that what disturbs one disturbs the others."""

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

    def as_dict(self) -> dict[str, float]:
        return {"ms": self.median * 1e3, "spread": self.spread}


@dataclass(frozen=True)
class Program:
    """A compiled program with the arguments to call it with."""

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
    """Call the variants in turn, `repeats` times each, after one call that warms up."""
    for variant in variants.values():
        jax.block_until_ready(variant())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = time.perf_counter()
            jax.block_until_ready(variant())
            seconds[name].append(time.perf_counter() - began)
    return {name: Times(np.array(values)) for name, values in seconds.items()}


def compared(programs: Mapping[str, Program], repeats: int) -> dict[str, dict[str, Any]]:
    """Of each program: its time, how often each kind of collective runs, and the bytes that each device sends."""
    times = interleaved(programs, repeats)
    return {name: {**times[name].as_dict(), **sends(program.collectives)} for name, program in programs.items()}


def sends(found: Sequence[Collective]) -> dict[str, Any]:
    return {"collectives": dict(count(found)), "sent_bytes": sent_bytes(found)}


def written(variant: Mapping[str, Any]) -> str:
    """Milliseconds and their spread."""
    return f"{variant['ms']:.3f} ±{variant['spread']:4.0%}"
