"""Engine for batches: a checkpoint on a mesh; prompts in, texts out."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float
from tqdm import tqdm

from moe_jax.analysis.explain import Explanation, evenly, explain
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.config import WeightDtype
from moe_jax.config.engine_options import MAX_N
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Engine, Generation, Options, Stats, log_plan, make_engine, plan_cache
from moe_jax.engine.distributed import ExplainRequest, ProcessGroup, SingleProcess
from moe_jax.engine.outputs import RequestOutput, StreamEvent
from moe_jax.errors import RequestError
from moe_jax.llm.engine_loop import EngineLoop
from moe_jax.llm.prompts import Prompt, Prompts, as_prompts, make_request_groups
from moe_jax.llm.request_group import RequestGroup
from moe_jax.llm.settings import description, dtype_name, model_identity, shared_settings
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs, StepFlags, StepInput
from moe_jax.sharding import (
    AUTO,
    DEFAULT_GATHER_DTYPE,
    Hardware,
    Placement,
    ResidualLayout,
    Role,
    Strategy,
    as_hardware,
    free_memory,
    placement_for,
)

logger = logging.getLogger(__name__)


class LLM:
    """Decode prompts in batches with one checkpoint.

    Threads may share an `LLM`: the requests of all of them are decoded together. Use it as a context manager, or call
    `close`, to free its memory.

    Args:
      checkpoint: directory in Hugging Face layout, or written by `moe-jax convert`; by default the bundled model, which
        adds numbers.
      mesh: `"data=2,expert=4"` (axes left out have size 1), axis sizes, a mesh or a `Placement`; by default all
        devices, as many of them as divide the model on `expert`.
      dtype: dtype of weights, cache and computation; by default that of the checkpoint.
      weight_dtype: precision of attention and feed-forward matrices. `"exact"` keeps `dtype`. `"int8"` and
        `"float8_e4m3fn"` hold eight bits for each weight, with a scale for each output; a checkpoint in float8 keeps
        its own scales.
      combine: `"auto"`, `"scatter"`, `"reduce"`, `"ragged"`, `"all-to-all"`, or a class derived from
        `moe_jax.sharding.Combine`.
      residual: rows between blocks on devices that split attention heads: `"whole"` on each device, or `"split"`
        between them (sequence parallelism); `"auto"` compares the costs.
      gather_dtype: precision of the rows gathered for feed-forward blocks: `"exact"`, or with less precision
        `"float8_e4m3fn"` or `"int8"`. Sums are always exact.
      hardware: hardware that the policy estimates times for: a name such as `"h100"`, a file written by
        `moe-jax bench --calibrate`, or a `moe_jax.sharding.Hardware`; by default that of the devices.
      scan_layers: compile repeated layers as one loop. Compilation time no longer grows with the number of layers, but
        each step copies the attention weights.
      max_length: maximum positions of a sequence, prompt included; by default those of the model, halved until the
        default cache holds a sequence. The last generated token takes no position. vLLM: `max_model_len`.
      max_batch_size: maximum sequences decoded together; more sequences wait. vLLM: `max_num_seqs`.
      max_n: maximum `SamplingParams.n` of a request.
      prefill_tokens: maximum prompt tokens of a step on each token shard, besides the sequences that decode. vLLM:
        `max_num_batched_tokens`.
      decode_steps: decode steps that the devices run before the host reads the tokens.
      cache_pages: pages of the KV cache, of 16 positions, on each token shard; by default all pages that can be in use,
        as far as `cache_memory` allows. vLLM: `num_gpu_blocks_override`.
      cache_memory: share of each device's free memory, after the weights, that the cache may take; by default 0.8 of an
        accelerator's and 0.1 of a CPU's. vLLM: `gpu_memory_utilization`, which is a share of the whole memory.
      prefix_cache: share the cached pages of common prompt prefixes; models with recurrent layers share none. vLLM:
        `enable_prefix_caching`.
      process_group: the return value of `moe_jax.distributed.join`, if several processes hold the mesh. Each process
        makes the same `LLM`; process 0 then uses it, and the others call `run_worker`.

    Raises:
      CheckpointError, ConfigError, PlacementError, ProcessGroupError, RequestError: see `moe_jax.errors`.
    """

    def __init__(
        self,
        checkpoint: str | Path = ADDER,
        *,
        mesh: str | Mapping[str, int] | Mesh | Placement | None = None,
        dtype: DTypeLike | None = None,
        weight_dtype: str = WeightDtype.EXACT,
        combine: str | Strategy = AUTO,
        residual: str | type[ResidualLayout] = AUTO,
        gather_dtype: str = DEFAULT_GATHER_DTYPE,
        hardware: str | Hardware | None = None,
        scan_layers: bool = ShardedDecoder.scan_layers,
        max_length: int | None = None,
        max_batch_size: int = Options.max_batch_size,
        max_n: int = MAX_N,
        prefill_tokens: int = Options.prefill_tokens,
        decode_steps: int = Options.decode_steps,
        cache_pages: int | None = Options.cache_pages,
        cache_memory: float | None = Options.cache_memory,
        prefix_cache: bool = Options.prefix_cache,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._checkpoint = Checkpoint(checkpoint)
        self.config, self.tokenizer = self._checkpoint.config, self._checkpoint.tokenizer
        self.max_batch_size, self.max_n = max_batch_size, max_n
        options = Options(
            max_length, max_batch_size, prefill_tokens, decode_steps, cache_pages, cache_memory, prefix_cache
        )
        weights = dtype_name(dtype or self._checkpoint.dtype), scan_layers, self._checkpoint.quantization(weight_dtype)
        decoder = ShardedDecoder(self.config, placement_for(self.config, mesh), *weights)
        self._policy = decoder.policy(as_hardware(hardware), combine, residual, gather_dtype)
        self._cache = plan_cache(options, decoder, free_memory(decoder.placement))
        self.max_length = self._cache.max_length
        self.identity = model_identity(self._checkpoint.path, decoder, gather_dtype, self.max_length)
        """Settings that generated tokens depend on, as text."""
        self._programs = Programs(decoder)
        self._process_group = process_group or SingleProcess()
        self.engine_loop = EngineLoop(self._load(options, (combine, residual, gather_dtype)))
        """The engine's thread, which all callers share."""

    def _load(self, options: Options, route: Sequence[object]) -> Engine:
        decoder, hardware = self._programs.decoder, self._policy.hardware
        self._process_group.check_agreement(shared_settings(decoder, options, self._cache.pages, hardware, *route))
        parameters = self._checkpoint.load(decoder)
        rows = self._cache.sizes.slots * decoder.config.block
        decision = self._policy.decide([rows] * decoder.placement.size(Role.TOKENS), rows)
        logger.info("%s", self._describe())
        logger.info("combine: %s", decision)
        for cost in decision.candidates:
            logger.debug("candidate: %s", cost)
        log_plan(self._cache, decoder)
        return make_engine(options, self._cache, self._programs, parameters, self._policy, self._process_group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise RequestError(
            "an LLM holds the memory of devices, so that it cannot be copied or pickled: make another LLM of the "
            "same checkpoint where it is needed"
        )

    def __repr__(self) -> str:
        return f"<LLM {self._describe()}>"

    def _describe(self) -> str:
        return description(self._checkpoint.path, self._programs.decoder, self._cache.bytes_per_device)

    def close(self) -> None:
        """Cancel all requests, and free weights and cache. Later calls of the other methods are errors."""
        self.engine_loop.close()

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
          prompts: one prompt or several: texts, lists or arrays of token ids, or vLLM's dictionaries `{"prompt": text}`
            and `{"prompt_token_ids": ids}`. A list of integers is one prompt.
          params: sampling parameters for all prompts, or for each.
          progress: show a progress bar.

        Raises:
          RequestError: a prompt is empty or too long, or has a token outside the vocabulary. Nothing is generated.
        """
        request_groups = self.request_groups(as_prompts(prompts), params)
        total = sum(group.max_tokens * group.params.n for group in request_groups)
        convert = Generation.count_new if progress else lambda generation: None
        with tqdm(total=total, desc="generating", unit=" tokens", disable=not progress, leave=False) as bar:
            for new_tokens in self.engine_loop.run(request_groups, lambda _, generation: convert(generation)):
                bar.update(new_tokens)
                bar.set_postfix_str(str(self.stats()), refresh=False)
        return [group.output() for group in request_groups]

    def stream(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[StreamEvent, None, None]:
        """Yield the tokens of all prompts as they are generated.

        The events of a sample come in order; the last one gives the finish reason. The requests begin when the
        generator is first advanced. Closing the generator, or leaving it, cancels the unfinished requests.

        Raises:
          RequestError: as for `generate`, before anything runs.
        """
        return self._stream(self.request_groups(as_prompts(prompts), params))

    def _stream(self, request_groups: Sequence[RequestGroup]) -> Generator[StreamEvent, None, None]:
        for group in request_groups:
            yield from group.empty_events
        yield from self.engine_loop.run(request_groups, RequestGroup.event)

    def logits(self, prompts: Prompts, *, last: int | None = None) -> list[Float[np.ndarray, "length vocab"]]:
        """Return the float32 logits after each token of each prompt.

        Args:
          last: return the logits after this many last tokens only. All logits of a prompt take `length * vocab * 4`
            bytes of the host's memory; use `score` for the log-probabilities of given tokens.

        Raises:
          RequestError: as for `generate`.
        """
        rows = self.max_length if last is None else last
        if rows < 1:
            raise RequestError(f"last must be at least 1, got {last}: leave it out for all logits")
        groups = self.request_groups(as_prompts(prompts), SamplingParams(max_tokens=0), logits_rows=rows)
        list(self.engine_loop.finished(groups))
        return [np.concatenate(group.generations[0].prompt_output.logits) for group in groups]

    def score(self, prompts: Prompts) -> list[Float[np.ndarray, "length-1"]]:
        """Return the float32 log-probability of each token of each prompt but the first, given the tokens before it.

        Raises:
          RequestError: as for `generate`.
        """
        groups = self.request_groups(as_prompts(prompts), SamplingParams(max_tokens=0, prompt_logprobs=0))
        list(self.engine_loop.finished(groups))
        return [np.array(group.generations[0].prompt_output.logprobs[1:], np.float32) for group in groups]

    def warm_up(self, *, sampling: bool = True, progress: bool = False) -> None:
        """Compile all steps of `generate` and `stream` in advance.

        Args:
          sampling: also compile the steps of requests that do more than greedy decoding.
          progress: show a progress bar.
        """
        variants = [StepFlags(), StepFlags(sampling=True)] if sampling else [StepFlags()]
        with self.engine_loop.paused() as engine:
            engine.warm_up(variants, progress=progress)

    def run_worker(self) -> None:
        """Run the steps of process 0, until process 0 leaves the process group. Call it in all other processes.

        Raises:
          ProcessGroupError: this process is process 0, or the only process.
        """
        for message in self._process_group.messages():
            match message:
                case StepInput():
                    self.engine_loop.engine.execute(message)
                case ExplainRequest(batch_size):
                    self._explain(batch_size)

    def stats(self) -> Stats:
        """Return throughput, latencies, balance and cache use since this `LLM` was made."""
        return self.engine_loop.engine.stats

    def explain(self, batch_size: int = 64) -> Explanation:
        """Explain a decode step of `batch_size` sequences: the combine and the reason for it, collectives and bytes."""
        if batch_size < 1:
            raise RequestError(f"a decode step needs at least one sequence, got {batch_size}")
        with self.engine_loop.paused():
            self._process_group.broadcast(ExplainRequest(batch_size))
            return self._explain(batch_size)

    def _explain(self, batch_size: int) -> Explanation:
        counts = evenly(batch_size, self._policy.placement.size(Role.TOKENS))
        free, held = self._cache.free_bytes, self._cache.bytes_per_device
        return explain(self._programs, self._policy, counts, self.max_length, free, held)

    def request_groups(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        logits_rows: int = 0,
    ) -> list[RequestGroup]:
        """Check prompts and sampling parameters, and make a request group for each prompt.

        Raises:
          RequestError: as for `generate`.
        """
        groups = make_request_groups(self._checkpoint, self.max_length, prompts, params, logits_rows=logits_rows)
        if too_many := [group.params.n for group in groups if group.params.n > self.max_n]:
            raise RequestError(f"n must be at most {self.max_n}, got {too_many[0]}: use a smaller n, or raise max_n")
        return groups
