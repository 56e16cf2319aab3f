"""Sizes of steps, and limits of the scheduler, that follow from the options of an engine."""

from __future__ import annotations

from collections.abc import Mapping

from moe_jax.config.engine_options import PAGE, Options
from moe_jax.engine.sizes import MIN_PAGES, MIN_PAGES_OF_LOOP, Sizes
from moe_jax.kernels.kv_cache import attention_tile_on
from moe_jax.models import ShardedDecoder
from moe_jax.scheduler import CacheGroup, Limits
from moe_jax.sharding import Role

MIN_PROMPTS, SHORT_PROMPT = 8, 64
"""Bound on the prompts of a step: `prefill_tokens / SHORT_PROMPT` on each token shard, but at least `MIN_PROMPTS`."""


def make_sizes(options: Options, decoder: ShardedDecoder) -> Sizes:
    """Return the sizes of steps, for options with a maximum length."""
    assert options.max_length is not None
    slots = -(-options.max_batch_size // decoder.placement.size(Role.TOKENS))
    prompts = min(max(options.prefill_tokens // SHORT_PROMPT, MIN_PROMPTS), slots)
    block = decoder.config.block
    # A request that only scores a full prompt still generates one token, which has a position in block diffusion.
    longest = options.max_length + (decoder.config.diffusion is not None)
    prompt_rows = min(max(options.prefill_tokens, 2 * slots, 2 * block), prompts * options.max_length)
    return Sizes(
        windows=decoder.windows,
        slots=slots,
        positions=-(-longest // block) * block,
        prompt_rows=-(-prompt_rows // block) * block,
        prompts=prompts,
        decode_steps=options.decode_steps,
        block=block,
        min_pages=MIN_PAGES if attention_tile_on(decoder.placement.device) is None else MIN_PAGES_OF_LOOP,
    )


def make_limits(options: Options, decoder: ShardedDecoder, sizes: Sizes, pages: Mapping[int | None, int]) -> Limits:
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
        prefix_cache=options.prefix_cache and not decoder.config.recurrent,  # pages hold no recurrent states
        block=sizes.block,
    )
