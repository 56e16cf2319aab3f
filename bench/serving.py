"""Random requests, and engines that serve them with continuous or static batching."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Engine, Generation, OutputQueue, Stats
from moe_jax.scheduler import Request

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


class Arrival(NamedTuple):
    """A request and its time of arrival."""

    seconds: float
    """Seconds after the first arrival."""
    prompt: list[int]
    tokens: int
    """Number of tokens to generate."""


@dataclass
class ServingRun:
    """Measurements of serving all arrivals once."""

    first: list[float] = field(default_factory=list)
    """Seconds from the arrival of each request to its first token."""
    between: list[float] = field(default_factory=list)
    """Seconds between tokens of a request, for each token but the first."""
    curve: list[tuple[float, int]] = field(default_factory=list)
    """Seconds, and number of tokens so far, after each dispatch."""
    outputs: dict[int, list[int]] = field(default_factory=dict)
    """Tokens of each request."""
    cache_use: float = 0.0
    """Largest share of the cache in use."""
    stats: Stats | None = None


def arrivals(options: Namespace, vocab_size: int) -> list[Arrival]:
    """Draw arrivals: a Poisson process, with log-normal lengths."""
    random = np.random.default_rng(options.seed)

    def lengths(median: int, largest: np.ndarray | int) -> np.ndarray:
        drawn = random.lognormal(np.log(median), options.tail, options.requests)
        return np.clip(np.rint(drawn), 1, largest).astype(int)

    times = np.cumsum(random.exponential(1 / options.rate, options.requests))
    prompts = lengths(options.prompt, options.positions // 2)
    tokens = lengths(options.output, options.positions - prompts + 1)
    return [
        Arrival(seconds, random.integers(vocab_size, size=prompt).tolist(), count)
        for seconds, prompt, count in zip((times - times[0]).tolist(), prompts.tolist(), tokens.tolist(), strict=True)
    ]


class Batching(NamedTuple):
    """Rules that admit requests to the engine."""

    admits: Callable[[Engine, int], int]
    """Function from an engine and its number of slots to the number of requests that may join."""
    lengths: Callable[[Sequence[Arrival]], list[int]]
    """Function from requests that join together to the number of tokens that each of them is decoded for."""


def one_batch(engine: Engine, slots: int) -> int:
    return 0 if engine.has_work else slots


def all_requests(engine: Engine, slots: int) -> int:
    return sys.maxsize


def longest_length(batch: Sequence[Arrival]) -> list[int]:
    return [max(arrival.tokens for arrival in batch)] * len(batch) if batch else []


def own_lengths(batch: Sequence[Arrival]) -> list[int]:
    return [arrival.tokens for arrival in batch]


BATCHINGS = {
    "static": Batching(one_batch, longest_length),
    "shrinking": Batching(one_batch, own_lengths),
    "continuous": Batching(all_requests, own_lengths),
}


def serve(engine: Engine, requests: Sequence[Arrival], batching: Batching, options: Namespace) -> ServingRun:
    """Serve all requests, each from its arrival on."""
    done, queue = ServingRun(), OutputQueue()
    last_seconds = {number: arrival.seconds for number, arrival in enumerate(requests)}
    arrived = admitted = tokens = 0
    began = time.perf_counter()
    while len(done.outputs) < len(requests) or engine.has_work:
        now = time.perf_counter() - began
        while arrived < len(requests) and requests[arrived].seconds <= now:
            arrived += 1
        batch = requests[admitted : min(arrived, admitted + batching.admits(engine, options.slots))]
        for number, (arrival, length) in enumerate(zip(batch, batching.lengths(batch), strict=True), admitted):
            max_tokens = min(length, options.positions - len(arrival.prompt) + 1)
            engine.add(Generation(Request(number, arrival.prompt, max_tokens), GREEDY, 0, frozenset(), None, queue))
        admitted += len(batch)
        if not engine.has_work:
            time.sleep(requests[arrived].seconds - now)
            continue
        engine.step()
        now = time.perf_counter() - began
        done.cache_use = max(done.cache_use, engine.stats.cache_use)
        for generation in queue.read():
            tokens += _record(generation, requests, now, last_seconds, done)
        done.curve.append((now, tokens))
    done.stats = engine.stats
    return done


def _record(
    generation: Generation, requests: Sequence[Arrival], now: float, last_seconds: dict[int, float], done: ServingRun
) -> int:
    """Record the new tokens of a request; return their number, without tokens beyond the request's length."""
    assert generation.error is None
    number = generation.request.id
    assert isinstance(number, int)
    if number in done.outputs:
        return 0
    before, _ = generation.reported
    generation.count_new()
    tokens = generation.tokens[: requests[number].tokens]
    count = len(tokens) - before
    if before:
        done.between += [(now - last_seconds[number]) / count] * count
    else:
        done.first.append(now - last_seconds[number])
    last_seconds[number] = now
    if len(tokens) == requests[number].tokens:
        done.outputs[number] = tokens
    return count
