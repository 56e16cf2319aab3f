"""Continuous batching loop: the host schedules the next step while the devices run the current one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32
from tqdm import tqdm

from moe_jax.config.sampling_params import MAX_TOP_LOGPROBS
from moe_jax.engine.distributed import ProcessGroup, SingleProcess
from moe_jax.engine.executor import Executor
from moe_jax.engine.generation import Generation, OutputNeed
from moe_jax.engine.input_builder import OutputMap, StepInputBuilder, build_input, idle_input, smallest_size
from moe_jax.engine.output_processor import add_prompt_output, step_outputs, top_logprobs
from moe_jax.engine.outputs import FinishReason
from moe_jax.engine.partial_outputs import StepOutput
from moe_jax.engine.size_chooser import SizeChooser
from moe_jax.engine.sizes import Sizes, StepSize
from moe_jax.engine.stats import Latency, Meter, Stats
from moe_jax.errors import RequestError
from moe_jax.programs import RowLogprobs, SampledTokens, StepFlags, StepInput
from moe_jax.scheduler import Plan, Request, Scheduler
from moe_jax.sharding import Placement, Role


class InFlightStep(NamedTuple):
    """Dispatch whose outputs are not read yet."""

    plan: Plan
    output_map: OutputMap
    emitted: Int32[Array, "shards*L W"]
    """Packed `SampledTokens`."""
    top_logprobs: int
    """Number of most likely tokens returned with each token."""
    scored: RowLogprobs | None
    """Log-probabilities of prompt tokens."""


class Engine:
    """Scheduler, executor and the requests that run. Not thread-safe."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        sizes: Sizes,
        placement: Placement,
        builder: Callable[..., StepInputBuilder] = StepInputBuilder,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """
        Args:
          sizes: shapes of steps.
          placement: placement of the model on the mesh.
          builder: class that builds step inputs.
          process_group: the processes that hold the mesh; None for one process.
        """
        self._scheduler, self._executor, self._sizes, self._placement = scheduler, executor, sizes, placement
        self._builder = builder
        self._process_group = process_group or SingleProcess()
        self._generations: dict[Request, Generation] = {}
        self._needs: Counter[OutputNeed] = Counter()
        self._in_flight: InFlightStep | None = None
        self._size_chooser = SizeChooser()
        self._meter = Meter(placement.size(Role.TOKENS))

    def add(self, generation: Generation) -> None:
        """Add a request.

        Raises:
          RequestError: a running request has the same id, or the request needs more pages than there are.
        """
        self._scheduler.add(generation.request)
        generation.last_token_time = self._now()
        self._generations[generation.request] = generation
        self._needs.update(generation.needs)

    @property
    def waiting(self) -> int:
        """Number of requests that do not run yet."""
        return self._scheduler.waiting

    @property
    def max_admitted(self) -> int:
        """Maximum number of requests that the next plan admits; at least 1."""
        limits = self._scheduler.limits
        free_slots = limits.slots * limits.shards - self._scheduler.running
        return max(1, min(limits.max_prefills * limits.shards, free_slots))

    @property
    def has_work(self) -> bool:
        return bool(self._generations) or self._in_flight is not None

    def cancel(self, generation: Generation) -> None:
        """End a request and free its slot and pages at once. Do nothing if the request has ended."""
        if generation.finish_reason is None:
            self._end(generation, "cancelled")

    def step(self) -> None:
        """Dispatch the next step, then read the outputs of the step before; generations report new output.

        If a step fails or is interrupted, all requests end with an error and the engine starts afresh.
        """
        began = self._now()
        try:
            plan = self._scheduler.plan()
            previous, self._in_flight = self._in_flight, self._dispatch(plan) if plan else None
            if previous:
                self._update_from_output(previous)
        except BaseException:
            self._reset()
            raise
        self._meter.busy_seconds += self._now() - began

    def _reset(self) -> None:
        """End all requests and discard the cache: nobody knows which planned steps have run."""
        self._in_flight = None
        for generation in list(self._generations.values()):
            self._end(generation, "error", "a step of this request failed or was interrupted")
        self._scheduler = type(self._scheduler)(self._scheduler.limits)
        self._executor.reset()

    def execute(self, step_input: StepInput) -> None:
        """Worker: execute a step that process 0 scheduled."""
        self._executor.run(step_input)

    @property
    def stats(self) -> Stats:
        """Throughput, latencies, balance and cache use since the engine was made."""
        scheduler, meter = self._scheduler, self._meter
        pages = [group.pages for group in scheduler.limits.groups] * scheduler.limits.shards
        return Stats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            finished=meter.finished,
            prompt_tokens=meter.prompt_tokens,
            generated_tokens=meter.generated_tokens,
            busy_seconds=meter.busy_seconds,
            first_token=Latency.of(meter.first_token),
            between_tokens=Latency.of(meter.between_tokens),
            rows_per_shard=meter.rows_per_shard,
            balance=meter.balance,
            pad_share=meter.pad_share,
            cache_use=sum(map(sum, scheduler.used_pages)) / sum(pages),
            weight_bytes=self._executor.weight_bytes,
            cache_bytes=self._executor.cache_bytes,
            preemptions=scheduler.preemptions,
            prefix_hits=scheduler.prefix_hits,
            compilations=self._executor.programs.compilations,
            compile_seconds=self._executor.programs.compile_seconds,
        )

    def warm_up(self, variants: Sequence[StepFlags], *, progress: bool) -> None:
        """Compile the steps of all sizes.

        Args:
          variants: outputs of the steps; each step is compiled once for each variant.
          progress: show a progress bar.

        Raises:
          RequestError: requests are running.
        """
        if self._generations:
            raise RequestError("requests are running: warm up before the first request, or after the last")
        if self._in_flight:
            step, self._in_flight = self._in_flight, None
            self._update_from_output(step)
        steps = list(product(self._sizes.steps(), variants))
        for size, flags in tqdm(steps, desc="compiling", unit=" steps", disable=not progress, leave=False):
            self._size_chooser.compiled.add((size, (flags, False)))
            step_input = idle_input(size, self._sizes, self._placement, flags, self._builder)
            self._process_group.broadcast(step_input)
            jax.block_until_ready(self._executor.run(step_input))

    def _dispatch(self, plan: Plan) -> InFlightStep:
        flags = StepFlags(
            sampling=self._needs[OutputNeed.SAMPLING] > 0,
            top_logprobs=MAX_TOP_LOGPROBS if self._needs[OutputNeed.TOP_LOGPROBS] else 0,
            logits=self._needs[OutputNeed.LOGITS] > 0,
        )
        generation = self._generations.__getitem__
        size = self._choose_size(plan, flags)
        step_input, output_map = build_input(plan, size, self._sizes, self._placement, flags, generation, self._builder)
        self._meter.step(plan.rows, step_input.batch.capacity, plan.steps)
        self._meter.prompt_tokens += sum(chunk.end - chunk.start for chunks in plan.chunks for chunk in chunks)
        self._process_group.broadcast(step_input)
        emitted, scored = self._executor.run(step_input)
        return InFlightStep(plan, output_map, emitted, flags.top_logprobs, scored)

    def _choose_size(self, plan: Plan, flags: StepFlags) -> StepSize:
        scores_prompts = any(self._generations[chunk.request].needs_prompt_rows for chunk in chain(*plan.chunks))
        return self._size_chooser.choose(smallest_size(plan, self._sizes), (flags, scores_prompts))

    def _update_from_output(self, step: InFlightStep) -> None:
        """Read the outputs of a dispatch and append them to the requests that still run."""
        emitted = SampledTokens.unpack(np.asarray(step.emitted), step.top_logprobs)
        scored = jax.device_get(step.scored)
        for prompt in step.output_map.prompts:
            if generation := self._generations.get(prompt.request):
                add_prompt_output(generation, prompt, scored)
        outputs = step_outputs(emitted, step.output_map.samples)
        tokens = {request: output.tokens for request, output in outputs.items()}
        self._scheduler.update_from_output(step.plan, tokens)
        now, last_times, counts, first = self._now(), [], [], []
        for request, output in outputs.items():
            if (generation := self._generations.get(request)) and output.tokens:
                before = len(generation.tokens)
                if generation.wants_top_logprobs:
                    generation.top_logprobs += top_logprobs(emitted, output, generation.params.logprobs)
                self._append(generation, output)
                if count := len(generation.tokens) - before:
                    last_times.append(generation.last_token_time)
                    counts.append(count)
                    first.append(not before)
                    generation.last_token_time = now
        self._meter.record_tokens(now - np.array(last_times), np.array(counts, int), np.array(first, bool))

    def _now(self) -> float:
        """Return the time in seconds, without the time spent on compilation."""
        return time.perf_counter() - self._executor.programs.compile_seconds

    def _append(self, generation: Generation, output: StepOutput) -> None:
        if not output.is_finite:
            self._end(generation, "error", "the model's logits are not finite: check its weights, or use a wider dtype")
            return
        generation.append(output)
        if generation.finish_reason is None:
            generation.report()
        else:
            self._forget(generation)

    def _end(self, generation: Generation, reason: FinishReason, error: str | None = None) -> None:
        generation.finish(reason, error)
        self._forget(generation)

    def _forget(self, generation: Generation) -> None:
        generation.report()
        self._scheduler.finish(generation.request.id)
        del self._generations[generation.request]
        self._needs.subtract(generation.needs)
        self._meter.finished += 1
