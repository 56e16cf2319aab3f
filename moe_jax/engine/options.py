"""Settings of an engine, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_jax.engine.sizes import MIN_PAGES, MIN_PAGES_OF_LOOP, Sizes
from moe_jax.errors import RequestError
from moe_jax.kernels.kv_cache import attention_tile_on
from moe_jax.models import ShardedDecoder
from moe_jax.programs import PAGE
from moe_jax.scheduler import CacheGroup, Limits
from moe_jax.sharding import Role

MIN_PROMPTS, SHORT_PROMPT = 8, 64
"""Bound on the prompts of a step: `prefill_tokens / SHORT_PROMPT` on each token shard, but at least `MIN_PROMPTS`."""


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

    def sizes(self, decoder: ShardedDecoder) -> Sizes:
        """Return the sizes of steps, for settings with a maximum length."""
        assert self.max_length is not None
        slots = -(-self.max_batch_size // decoder.placement.size(Role.TOKENS))
        prompts = min(max(self.prefill_tokens // SHORT_PROMPT, MIN_PROMPTS), slots)
        block = decoder.config.block
        # A request that only scores a full prompt still generates one token, which has a position in block diffusion.
        longest = self.max_length + (decoder.config.diffusion is not None)
        prompt_rows = min(max(self.prefill_tokens, 2 * slots, 2 * block), prompts * self.max_length)
        return Sizes(
            windows=decoder.windows,
            slots=slots,
            positions=-(-longest // block) * block,
            prompt_rows=-(-prompt_rows // block) * block,
            prompts=prompts,
            decode_steps=self.decode_steps,
            block=block,
            min_pages=MIN_PAGES if attention_tile_on(decoder.placement.device) is None else MIN_PAGES_OF_LOOP,
        )

    def limits(self, decoder: ShardedDecoder, sizes: Sizes, pages: Mapping[int | None, int]) -> Limits:
        """Return the limits that the scheduler keeps."""
        return Limits(
            shards=decoder.placement.size(Role.TOKENS),
            slots=sizes.slots,
            page=PAGE,
            groups=tuple(CacheGroup(pages[window], window) for window in decoder.windows),
            max_chunk_tokens=sizes.prompt_rows,
            max_prefills=sizes.prompts,
            max_rows=sizes.prompt_rows,
            decode_steps=sizes.decode_steps,
            prefix_cache=self.prefix_cache and not decoder.config.recurrent,  # pages hold no recurrent states
            block=sizes.block,
        )
