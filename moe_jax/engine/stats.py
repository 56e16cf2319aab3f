"""Throughput and latencies of a running engine, in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_jax.analysis.units import format_seconds


class Histogram:
    """Times from a microsecond to an hour, in bins that grow by a twentieth."""

    LOWEST, STEP, BINS = 1e-6, math.log(1.05), 460

    def __init__(self) -> None:
        self._counts = np.zeros(self.BINS, np.int64)

    def add(self, seconds: np.ndarray, times: np.ndarray | int) -> None:
        """Count each value `times` times."""
        places = np.log(np.maximum(seconds, self.LOWEST) / self.LOWEST) / self.STEP
        np.add.at(self._counts, np.minimum(places.astype(int), self.BINS - 1), times)

    def percentile(self, percent: float) -> float:
        """Return a percentile in seconds; 0 if the histogram is empty."""
        total = self._counts.sum()
        if not total:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._counts), percent / 100 * total))
        return self.LOWEST * math.exp((place + 0.5) * self.STEP)


@dataclass(frozen=True)
class Latency:
    """Percentiles of a latency, in seconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, histogram: Histogram) -> Latency:
        return cls(*map(histogram.percentile, (50, 90, 99)))


@dataclass(frozen=True)
class Stats:
    """Statistics of an engine since it was made. Only `compile_seconds` includes compilation."""

    running: int
    """Samples that run now."""
    waiting: int
    """Samples that wait now."""
    finished: int
    """Samples that ended, for any reason."""
    prompt_tokens: int
    """Prompt tokens computed; tokens recomputed after a preemption count again."""
    generated_tokens: int
    """Tokens generated and returned: tokens computed after a stop do not count."""
    busy_seconds: float
    """Seconds in which the engine had work."""
    first_token: Latency
    """Time from the arrival of a request to its first token (TTFT)."""
    between_tokens: Latency
    """Time between tokens of a request (ITL)."""
    rows_per_shard: tuple[int, ...]
    """Rows of each token shard in the last step."""
    balance: float
    """Mean number of rows of a token shard over the largest, over all steps, weighted by the rows of each step."""
    pad_share: float
    """Share of padding among the rows that steps computed."""
    cache_use: float
    """Share of the cache pages that running requests hold."""
    weight_bytes: int
    """Bytes of the weights on each device."""
    cache_bytes: int
    """Bytes of the cache on each device, in use or not."""
    preemptions: int
    """Preemptions of requests for want of pages."""
    prefix_hits: int
    """Prompt positions that came from the prefix cache."""
    compilations: int
    """Programs compiled."""
    compile_seconds: float
    """Seconds spent on compiling them, which no other time includes."""

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.busy_seconds if self.busy_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} tokens/s, first token {format_seconds(self.first_token.p50)}, "
            f"then {format_seconds(self.between_tokens.p50)} each, {self.running:,} running, {self.waiting:,} waiting, "
            f"balance {self.balance:.0%}, cache {self.cache_use:.0%}, "
            f"{self.compilations:,} programs compiled in {format_seconds(self.compile_seconds)}"
        )


class Meter:
    """Sums from which `Stats` are computed."""

    def __init__(self, shards: int) -> None:
        self.finished = self.prompt_tokens = self.generated_tokens = 0
        self.busy_seconds = 0.0
        self.first_token, self.between_tokens = Histogram(), Histogram()
        self.rows_per_shard = (0,) * shards
        self._rows = self._even_rows = self._buffered_rows = 0

    def step(self, rows: list[int], capacity: int, steps: int) -> None:
        """Record a dispatch of `steps` steps with `rows` rows on each token shard, in buffers of `capacity` rows."""
        self.rows_per_shard = tuple(rows)
        self._rows += sum(rows) * steps
        self._even_rows += max(rows) * len(rows) * steps
        self._buffered_rows += capacity * len(rows) * steps

    def record_tokens(self, waits: np.ndarray, counts: np.ndarray, first: np.ndarray) -> None:
        """Record the tokens of a dispatch.

        Args:
          waits: seconds that each request waited for its tokens.
          counts: number of tokens of each request.
          first: True for a request that got its first tokens.
        """
        self.generated_tokens += int(counts.sum())
        self.first_token.add(waits[first], 1)
        self.between_tokens.add((waits / counts)[~first], counts[~first])

    @property
    def balance(self) -> float:
        return self._rows / self._even_rows if self._even_rows else 1.0

    @property
    def pad_share(self) -> float:
        return 1 - self._rows / self._buffered_rows if self._buffered_rows else 0.0
