"""Settings of an engine, the sizes that follow from them, and the engine itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from moe_jax.analysis.roofline import held_bytes
from moe_jax.config import ModelConfig
from moe_jax.engine.diffusion_input_builder import DiffusionInputBuilder
from moe_jax.engine.distributed import ProcessGroup
from moe_jax.engine.engine import Engine
from moe_jax.engine.executor import Executor
from moe_jax.engine.input_builder import StepInputBuilder
from moe_jax.engine.sizes import MIN_PAGES, MIN_PAGES_OF_LOOP, Sizes, max_pages
from moe_jax.errors import RequestError
from moe_jax.kernels.kv_cache import attention_tile_on
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.programs import PAGE, Programs
from moe_jax.scheduler import CacheGroup, DiffusionScheduler, Limits, Scheduler
from moe_jax.sharding import Policy, Role

MIN_PROMPTS, SHORT_PROMPT = 8, 64
"""Bound on the prompts of a step: `prefill_tokens / SHORT_PROMPT` on each token shard, but at least `MIN_PROMPTS`."""


@dataclass(frozen=True)
class Options:
    """Settings of an engine.

    Raises:
      RequestError: a number out of range.
    """

    max_length: int
    """Maximum positions of a sequence."""
    max_batch_size: int = 256
    """Maximum sequences decoded together; more sequences wait."""
    prefill_tokens: int = 512
    """Maximum prompt tokens of a step on each token shard; at least two for each sequence, and two blocks."""
    decode_steps: int = 8
    """Decode steps that the devices run before the host reads the tokens."""
    cache_pages: int | None = None
    """Pages of the KV cache, of 16 positions, on each token shard; None for all pages that can be in use, as far as
    `cache_memory` allows."""
    cache_memory: float = 0.8
    """Share of each device's memory, after the weights, that the cache may take."""
    prefix_cache: bool = True
    """Share the cached pages of common prompt prefixes."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "prefill_tokens", "decode_steps", "cache_pages"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= 1):
                raise RequestError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not (isinstance(self.cache_memory, int | float) and 0 < self.cache_memory <= 1):
            raise RequestError(f"cache_memory must be a share above 0 and at most 1, got {self.cache_memory!r}")

    def sizes(self, decoder: ShardedDecoder) -> Sizes:
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

    def pages(self, decoder: ShardedDecoder, policy: Policy, sizes: Sizes) -> dict[int | None, int]:
        """Return the number of cache pages on each token shard, for each attention window of the decoder.

        Raises:
          RequestError: the pages do not hold a single sequence.
        """
        needed = {window: sizes.needed_pages(window) for window in decoder.windows}
        if self.cache_pages is not None:
            pages = {window: min(self.cache_pages, limit) for window, limit in needed.items()}
        else:
            memory = policy.hardware.memory / policy.hardware.sharers(decoder.placement)
            room = max(memory - held_bytes(decoder.parameters), 0) * self.cache_memory
            without_pages, with_all_pages = (
                held_bytes(decoder.abstract_caches(held, PAGE, sizes.slots))
                for held in (dict.fromkeys(needed, 0), needed)
            )
            share = min(max(room - without_pages, 0) / max(with_all_pages - without_pages, 1), 1)
            pages = {window: int(limit * share) for window, limit in needed.items()}
        rows = max(sizes.prompt_rows, sizes.decode_steps)
        one_sequence = {window: max_pages(window, sizes.positions, rows) for window in decoder.windows}
        lacking = [window for window in pages if pages[window] < one_sequence[window]]
        if lacking:
            window = max(lacking, key=one_sequence.__getitem__)
            advice = "lower max_length or max_batch_size, raise cache_memory, or use more devices"
            if self.cache_pages is not None:
                advice = f"set cache_pages to {one_sequence[window]} or more"
            raise RequestError(
                f"there is room for {pages[window]} pages of {PAGE} positions on each token shard, but a sequence of "
                f"{self.max_length} positions needs {one_sequence[window]}: {advice}"
            )
        return pages

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

    def engine(self, programs: Programs, parameters: Parameters, policy: Policy, process_group: ProcessGroup) -> Engine:
        """Make an engine with empty caches."""
        decoder = programs.decoder
        sizes = self.sizes(decoder)
        pages = self.pages(decoder, policy, sizes)
        executor = Executor(programs, parameters, policy, sizes, pages)
        limits = self.limits(decoder, sizes, pages)
        scheduler, builder = Scheduler, StepInputBuilder
        if decoder.config.diffusion is not None:
            scheduler, builder = DiffusionScheduler, partial(DiffusionInputBuilder, diffusion=decoder.config.diffusion)
        return Engine(scheduler(limits), executor, sizes, decoder.placement, builder, process_group)


def resolve_max_length(config: ModelConfig, requested: int | None) -> int:
    """Return the maximum positions of a sequence: the requested number, by default that of the model.

    Raises:
      RequestError: the number is below 1, or above that of the model.
    """
    limit = config.max_positions
    if requested is not None and not (isinstance(requested, int) and 1 <= requested <= limit):
        raise RequestError(f"max_length must be from 1 to the {limit} positions of this model, got {requested!r}")
    return requested or limit
