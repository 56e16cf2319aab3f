"""Number of cache pages, and maximum length of a sequence, that the free memory allows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moe_jax.analysis.roofline import held_bytes
from moe_jax.analysis.units import format_bytes
from moe_jax.config.engine_options import ACCELERATOR_SHARE, CPU_SHARE, PAGE, Options
from moe_jax.engine.options import make_sizes
from moe_jax.engine.sizes import Sizes, max_pages
from moe_jax.errors import CapacityError, RequestError
from moe_jax.models import ShardedDecoder

logger = logging.getLogger(__name__)

Pages = dict[int | None, int]
"""Number of cache pages on each token shard, for each attention window."""


@dataclass(frozen=True)
class CachePlan:
    """Cache of an engine, and the sizes of its steps."""

    max_length: int
    """Maximum positions of a sequence."""
    sizes: Sizes
    pages: Pages
    bytes_per_device: int
    """Bytes of the cache on each device."""
    free_bytes: float
    """Bytes that were free on each device before the weights were loaded."""


def plan_cache(options: Options, decoder: ShardedDecoder, free: float) -> CachePlan:
    """Choose the pages of the cache, and the maximum length where none is requested.

    By default the cache has all pages that can be in use at once, but takes at most a share of the free memory; it
    takes more only for one sequence of a requested `max_length`. Without a request the maximum length is that of the
    model, halved until the cache holds a sequence.

    Args:
      free: bytes that are free on each device before the weights are loaded.

    Raises:
      CapacityError: the cache does not hold a sequence.
      RequestError: the maximum length is not within the model's positions.
    """
    room = max(free - held_bytes(decoder.parameters), 0)
    default = CPU_SHARE if decoder.placement.device.platform == "cpu" else ACCELERATOR_SHARE
    is_default = options.cache_memory is None and options.cache_pages is None
    longest = _check_length(options.max_length, decoder.config.max_positions)
    shares = [default, ACCELERATOR_SHARE] if is_default else [options.cache_memory or default]
    lengths = list(_halvings(longest)) if is_default and options.max_length is None else [longest]
    attempts = [_Attempt(replace(options, max_length=length), decoder, room * shares[0]) for length in lengths]
    if options.max_length is not None:
        attempts += [_Attempt(options, decoder, room * share, grows=False) for share in shares[1:]]
    chosen = next((attempt for attempt in attempts if not attempt.lacking), None)
    if chosen is None:
        raise attempts[-1].error(next(_fitting(attempts[-1]), None))
    return chosen.plan(free)


def log_plan(plan: CachePlan, decoder: ShardedDecoder) -> None:
    """Log the memory of the cache, and the options that change it."""
    devices, model = decoder.placement.mesh.devices.size, decoder.config.max_positions
    shorter = f" of the model's {model:,}" if plan.max_length < model else ""
    logger.info(
        "KV cache: %s on %d devices, for sequences of up to %s%s positions; cache_memory, cache_pages and "
        "max_length change it",
        format_bytes(plan.bytes_per_device * devices),
        devices,
        f"{plan.max_length:,}",
        shorter,
    )


class _Attempt:
    """Cache in a given room."""

    def __init__(self, options: Options, decoder: ShardedDecoder, room: float, *, grows: bool = True) -> None:
        """
        Args:
          options: settings with a maximum length.
          room: bytes on each device.
          grows: hold more than one sequence if there is room.
        """
        assert options.max_length is not None
        self.options, self.decoder, self.room, self.length = options, decoder, room, options.max_length
        self.sizes = make_sizes(options, decoder)
        rows = max(self.sizes.prompt_rows, self.sizes.decode_steps)
        self.one_sequence = {window: max_pages(window, self.sizes.positions, rows) for window in decoder.windows}
        self.pages = self._pages()
        self.lacking = [window for window, pages in self.pages.items() if pages < self.one_sequence[window]]
        if not grows and not self.lacking:
            self.pages = self.one_sequence

    def _pages(self) -> Pages:
        needed = {window: self.sizes.needed_pages(window) for window in self.decoder.windows}
        if (requested := self.options.cache_pages) is not None:
            return {window: min(requested, limit) for window, limit in needed.items()}
        without_pages, with_all_pages = self._bytes(dict.fromkeys(needed, 0)), self._bytes(needed)
        share = min(max(self.room - without_pages, 0) / max(with_all_pages - without_pages, 1), 1)
        return {window: int(limit * share) for window, limit in needed.items()}

    def _bytes(self, pages: Mapping[int | None, int]) -> int:
        return held_bytes(self.decoder.abstract_caches(pages, PAGE, self.sizes.slots))

    def plan(self, free: float) -> CachePlan:
        return CachePlan(self.length, self.sizes, self.pages, self._bytes(self.pages), free)

    def error(self, fitting: int | None) -> CapacityError:
        """Return the error for a cache that does not hold a sequence.

        Args:
          fitting: a maximum length that fits, if there is one.
        """
        window = max(self.lacking, key=self.one_sequence.__getitem__)
        shorter = f"set max_length={fitting}, " if fitting else ""
        advice = f"{shorter}lower max_batch_size, raise cache_memory, or use more devices"
        if self.options.cache_pages is not None:
            advice = f"set cache_pages to {self.one_sequence[window]} or more"
        return CapacityError(
            f"there is room for {self.pages[window]} pages of {PAGE} positions on each token shard, but a sequence of "
            f"{self.length} positions needs {self.one_sequence[window]}: {advice}"
        )


def _fitting(attempt: _Attempt) -> Iterator[int]:
    """Yield shorter maximum lengths that fit."""
    for length in _halvings(attempt.length):
        if not _Attempt(replace(attempt.options, max_length=length), attempt.decoder, attempt.room).lacking:
            yield length


def _halvings(length: int) -> Iterator[int]:
    while length:
        yield length
        length //= 2


def _check_length(requested: int | None, limit: int) -> int:
    if requested is not None and not (isinstance(requested, int) and 1 <= requested <= limit):
        raise RequestError(f"max_length must be from 1 to the {limit} positions of this model, got {requested!r}")
    return requested or limit
