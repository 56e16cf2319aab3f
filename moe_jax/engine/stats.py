"""Figures of a running engine, in constant memory however long it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


class Histogram:
    """Seconds from a microsecond to an hour, told to a twentieth."""

    LOWEST, STEP, BINS = 1e-6, math.log(1.05), 460

    def __init__(self) -> None:
        self._counts = np.zeros(self.BINS, np.int64)

    def add(self, seconds: np.ndarray, times: np.ndarray | int) -> None:
        """Each of them, so many times."""
        places = np.log(np.maximum(seconds, self.LOWEST) / self.LOWEST) / self.STEP
        np.add.at(self._counts, np.minimum(places.astype(int), self.BINS - 1), times)

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent are not above; 0 where nothing was added."""
        total = self._counts.sum()
        if not total:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._counts), percent / 100 * total))
        return self.LOWEST * math.exp((place + 0.5) * self.STEP)


@dataclass(frozen=True)
class Latency:
    """Percentiles, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, histogram: Histogram) -> Latency:
        return cls(*map(histogram.percentile, (50, 90, 99)))


@dataclass(frozen=True)
class Stats:
    """What an engine has done since it was made; compilation is not counted in any time."""

    running: int
    waiting: int
    finished: int
    """Samples that ended, in whatever way."""
    prompt_tokens: int
    """Computed, those computed again after a preemption too."""
    generated_tokens: int
    busy_seconds: float
    """In which there was something to do."""
    first_token: Latency
    """From the arrival of a request to its first token."""
    between_tokens: Latency
    rows_per_shard: tuple[int, ...]
    """Of the last step."""
    balance: float
    """Mean over largest rows of a token shard, over all steps, each step as much as its rows."""
    pad_share: float
    """Of the rows that steps took time for."""
    cache_use: float
    """Share of the pages that running requests hold."""
    preemptions: int
    prefix_hits: int
    """Positions of prompts that were taken from the prefix cache."""

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.busy_seconds if self.busy_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:.0f} tokens/s, first token {self.first_token.p50 * 1e3:.0f} ms, "
            f"then {self.between_tokens.p50 * 1e3:.1f} ms each, {self.running} running, {self.waiting} waiting, "
            f"balance {self.balance:.2f}, cache {self.cache_use:.0%}"
        )


class Meter:
    """Adds up what `Stats` tells."""

    def __init__(self, shards: int) -> None:
        self.finished = self.prompt_tokens = self.generated_tokens = 0
        self.busy_seconds = 0.0
        self.first_token, self.between_tokens = Histogram(), Histogram()
        self.rows_per_shard = (0,) * shards
        self._rows = self._even_rows = self._buffered_rows = 0

    def step(self, rows: list[int], capacity: int, steps: int) -> None:
        self.rows_per_shard = tuple(rows)
        self._rows += sum(rows) * steps
        self._even_rows += max(rows) * len(rows) * steps
        self._buffered_rows += capacity * len(rows) * steps

    def record_tokens(self, waits: np.ndarray, counts: np.ndarray, first: np.ndarray) -> None:
        """Of each request that got tokens: the seconds that it waited, for how many, and whether they are its first."""
        self.generated_tokens += int(counts.sum())
        self.first_token.add(waits[first], 1)
        self.between_tokens.add((waits / counts)[~first], counts[~first])

    @property
    def balance(self) -> float:
        return self._rows / self._even_rows if self._even_rows else 1.0

    @property
    def pad_share(self) -> float:
        return 1 - self._rows / self._buffered_rows if self._buffered_rows else 0.0
