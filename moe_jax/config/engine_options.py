"""Settings of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from moe_jax.errors import RequestError

PAGE = 16
"""Positions in a page of the KV cache. Chunks of a prompt start at multiples of it."""
ACCELERATOR_SHARE, CPU_SHARE = 0.8, 0.1
"""Default shares of the free memory, after the weights, that the cache takes at most. The rest of an accelerator's
memory holds the temporary arrays of steps; that of a CPU serves other programs."""
MAX_N = 1024
"""Default for the maximum `SamplingParams.n`."""


@dataclass(frozen=True)
class Options:
    """Settings of an engine.

    Raises:
      RequestError: a number out of range.
    """

    max_length: int | None = None
    """Maximum positions of a sequence; None for those of the model, or fewer if the cache holds fewer."""
    max_batch_size: int = 256
    """Maximum sequences decoded together; more sequences wait."""
    prefill_tokens: int = 512
    """Maximum prompt tokens of a step on each token shard; at least two for each sequence, and two blocks."""
    decode_steps: int = 8
    """Decode steps that the devices run before the host reads the tokens."""
    cache_pages: int | None = None
    """Pages of the KV cache, of 16 positions, on each token shard; None for all pages that can be in use, as far as
    `cache_memory` allows."""
    cache_memory: float | None = None
    """Share of each device's free memory, after the weights, that the cache may take; None for 0.8 of an accelerator's
    and 0.1 of a CPU's, or more if one sequence of `max_length` needs more."""
    prefix_cache: bool = True
    """Share the cached pages of common prompt prefixes."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "prefill_tokens", "decode_steps", "cache_pages"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= 1):
                raise RequestError(f"{name} must be a whole number, at least 1, got {value!r}")
        share = self.cache_memory
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            raise RequestError(f"cache_memory must be a share above 0 and at most 1, got {self.cache_memory!r}")
