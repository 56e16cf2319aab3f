"""What users say about an engine, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from moe_jax.analysis.roofline import held_bytes
from moe_jax.engine.diffusion_inputs import DiffusionInputBuilder
from moe_jax.engine.distributed import ProcessGroup
from moe_jax.engine.engine import Engine
from moe_jax.engine.executor import Executor
from moe_jax.engine.sizes import Sizes
from moe_jax.errors import RequestError
from moe_jax.models import Parameters, ShardedDecoder
from moe_jax.programs import PAGE, Programs
from moe_jax.scheduler import CacheGroup, DiffusionScheduler, Limits, Scheduler
from moe_jax.sharding import Policy, Role


@dataclass(frozen=True)
class Options:
    """
    Raises:
      RequestError: a number out of range.
    """

    max_length: int
    """Positions of a sequence, at most."""
    max_batch_size: int = 256
    """Sequences that are decoded together, at most; more wait."""
    prefill_tokens: int = 512
    """Prompt tokens that a token shard takes into one step, at most."""
    decode_steps: int = 8
    """Decode steps that the devices run before the host looks at them."""
    cache_pages: int | None = None
    """Pages, of 16 positions, on each token shard; by default as many as can be in use, or as `cache_memory` allows."""
    cache_memory: float = 0.8
    """The share of a device's memory beside its weights that the cache may take."""
    prefix_cache: bool = True
    """Whether prompts that begin alike share what was computed of it."""

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "prefill_tokens", "decode_steps", "cache_pages"):
            if (value := getattr(self, name)) is not None and not (isinstance(value, int) and value >= 1):
                raise RequestError(f"{name} must be a whole number, at least 1, got {value!r}")
        if not (isinstance(self.cache_memory, int | float) and 0 < self.cache_memory <= 1):
            raise RequestError(f"cache_memory is a share, above 0 and at most 1, got {self.cache_memory!r}")

    def sizes(self, decoder: ShardedDecoder) -> Sizes:
        slots = -(-self.max_batch_size // decoder.placement.size(Role.TOKENS))
        prompts = min(max(self.prefill_tokens // SHORT_PROMPT, FEW_PROMPTS), slots)
        block = decoder.config.block
        # A full prompt of which only its own tokens are told is given one more, which has a position where blocks have.
        longest = self.max_length + (decoder.config.diffusion is not None)
        prompt_rows = min(max(self.prefill_tokens, 2 * slots), prompts * self.max_length)
        return Sizes(
            windows=decoder.windows,
            slots=slots,
            positions=-(-longest // block) * block,
            prompt_rows=-(-prompt_rows // block) * block,
            prompts=prompts,
            decode_steps=self.decode_steps,
            block=block,
        )

    def pages(self, decoder: ShardedDecoder, policy: Policy, sizes: Sizes) -> dict[int | None, int]:
        """Of each token shard, for each of the decoder's windows.

        Raises:
          RequestError: no room for a single sequence.
        """
        needed = {window: sizes.needed_pages(window) for window in decoder.windows}
        one = {window: _one_sequence(window, sizes) for window in decoder.windows}
        if self.cache_pages is not None:
            pages = {window: min(self.cache_pages, limit) for window, limit in needed.items()}
        else:
            room = policy.hardware.memory / policy.hardware.sharers(decoder.placement)
            room = max(room - held_bytes(decoder.parameters), 0) * self.cache_memory
            states, everything = (
                held_bytes(decoder.abstract_caches(held, PAGE, sizes.slots))
                for held in (dict.fromkeys(needed, 0), needed)
            )
            share = min(max(room - states, 0) / max(everything - states, 1), 1)
            pages = {window: int(limit * share) for window, limit in needed.items()}
        if any(pages[window] < one[window] for window in pages):
            raise RequestError(
                f"there is room for {min(pages.values())} pages of {PAGE} positions on each token shard, a sequence of "
                f"{self.max_length} positions needs {max(one.values())}: ask for a smaller max_length or "
                "max_batch_size, or give the cache more (cache_pages, cache_memory), or more devices"
            )
        return pages

    def limits(self, decoder: ShardedDecoder, sizes: Sizes, pages: Mapping[int | None, int]) -> Limits:
        """What the scheduler keeps to."""
        return Limits(
            shards=decoder.placement.size(Role.TOKENS),
            slots=sizes.slots,
            page=PAGE,
            groups=tuple(CacheGroup(pages[window], window) for window in decoder.windows),
            chunk=sizes.prompt_rows,
            chunks=sizes.prompts,
            rows=sizes.prompt_rows,
            decode_steps=sizes.decode_steps,
            prefix_cache=self.prefix_cache and not decoder.config.recurrent,  # pages carry no states
            block=sizes.block,
        )

    def engine(self, programs: Programs, parameters: Parameters, policy: Policy, process_group: ProcessGroup) -> Engine:
        decoder = programs.decoder
        sizes = self.sizes(decoder)
        pages = self.pages(decoder, policy, sizes)
        executor = Executor(programs, parameters, policy, sizes, pages, process_group)
        limits = self.limits(decoder, sizes, pages)
        if decoder.config.diffusion is None:
            return Engine(Scheduler(limits), executor, sizes, decoder.placement)
        builder = partial(DiffusionInputBuilder, diffusion=decoder.config.diffusion)
        return Engine(DiffusionScheduler(limits), executor, sizes, decoder.placement, builder)


FEW_PROMPTS, SHORT_PROMPT = 8, 64
"""A token shard takes no more prompts into one step than these few, or than its prompt tokens are short prompts."""


def _one_sequence(window: int | None, sizes: Sizes) -> int:
    group = CacheGroup(1, window)
    return group.max_pages(sizes.positions, max(sizes.prompt_rows, sizes.decode_steps), PAGE)
