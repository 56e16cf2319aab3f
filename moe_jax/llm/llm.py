"""The public face: a checkpoint on a mesh, prompts in, texts out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import index
from pathlib import Path
from reprlib import repr as shortened

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float
from tqdm import tqdm

from moe_jax.analysis.explain import Explanation, evenly, explain
from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.bundled import ADDER
from moe_jax.config import ModelConfig, WeightDtype
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.engine import Generation, Options, OutputQueue, Stats
from moe_jax.engine.distributed import ProcessGroup, SingleProcess
from moe_jax.engine.outputs import RequestOutput, StreamEvent
from moe_jax.errors import RequestError
from moe_jax.llm.request_group import RequestGroup, StopTokens
from moe_jax.models import ShardedDecoder
from moe_jax.programs import Programs, StepFlags, StepInput
from moe_jax.scheduler import DiffusionRequest, Request
from moe_jax.sharding import (
    AUTO,
    DEFAULT_GATHER_DTYPE,
    Hardware,
    Placement,
    ResidualLayout,
    Role,
    Strategy,
    as_hardware,
    as_placement,
)

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class ExplainRequest:
    """An order to compile what `LLM.explain` looks at: compilers of several processes may work together."""

    batch_size: int


class LLM:
    """Decodes one checkpoint in batches.

    Args:
      checkpoint: a directory in Hugging Face layout, or one that `moe-jax convert` wrote; by default the bundled model,
        which adds numbers.
      mesh: `"data=2,expert=4"` (axes left out have size 1), axis sizes, a mesh or a `Placement`; by default all devices
        on `expert`.
      dtype: of weights, cache and computation; by default what the checkpoint says.
      weight_dtype: of the matrices of attention and feed-forwards: `"exact"` (in `dtype`), or in eight bits, `"int8"`
        or `"float8_e4m3fn"`, with a scale for each output, or those of a checkpoint that has them in float8.
      combine: `"auto"`, `"scatter"`, `"reduce"`, `"ragged"`, `"all-to-all"`, or a class derived from
        `moe_jax.sharding.Combine`.
      residual: where attention heads are split over devices, whether each keeps the `"whole"` rows of its token shard
        between blocks or they `"split"` them (sequence parallelism); `"auto"` weighs both.
      gather_dtype: how rows are sent to feed-forward blocks: `"exact"`, or with less precision `"float8_e4m3fn"` or
        `"int8"`. Sums are always exact.
      hardware: what the policy reckons with: a name such as `"h100"`, a file that `moe-jax bench --calibrate` wrote, or
        a `moe_jax.sharding.Hardware`; by default that of the devices.
      scan_layers: whether layers that are alike are one loop, whose program is soon compiled however deep the model;
        such a loop copies the weights of each layer's attention before they are read.
      max_length: the most positions of a sequence, prompt included; by default those the model was made for. The last
        token that is generated takes none.
      max_batch_size: sequences decoded together; more wait.
      prefill_tokens: prompt tokens that a token shard takes into one step, at most, beside the sequences that decode.
      decode_steps: decode steps that the devices run before the host looks at them.
      cache_pages: pages of the KV cache, of 16 positions, on each token shard; by default as many as can be in use at
        once, or as `cache_memory` allows.
      cache_memory: the share of a device's memory beside its weights that the cache may take.
      prefix_cache: whether prompts that begin alike share what was computed of it; those of a model with recurrent
        layers do not.
      crew: what `moe_jax.distributed.join` gave, where several processes hold the mesh: each makes the same `LLM`, then
        process 0 uses it and the others `run_worker`.

    Raises:
      CheckpointError, ConfigError, PlacementError, ProcessGroupError: see `moe_jax.errors`.
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
        prefill_tokens: int = Options.prefill_tokens,
        decode_steps: int = Options.decode_steps,
        cache_pages: int | None = Options.cache_pages,
        cache_memory: float = Options.cache_memory,
        prefix_cache: bool = Options.prefix_cache,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._checkpoint = Checkpoint(checkpoint)
        self.config, self.tokenizer = self._checkpoint.config, self._checkpoint.tokenizer
        self.max_length = resolve_max_length(self.config, max_length)
        options = Options(
            self.max_length, max_batch_size, prefill_tokens, decode_steps, cache_pages, cache_memory, prefix_cache
        )
        dtype = _name(dtype or self._checkpoint.dtype)
        quantization = self._checkpoint.quantization(weight_dtype)
        decoder = ShardedDecoder(self.config, as_placement(mesh), dtype, scan_layers, quantization)
        self._policy = decoder.policy(as_hardware(hardware), combine, residual, gather_dtype)
        model = f"{self._checkpoint.path.resolve()}, {_digest(self.config)}"
        self.identity = f"{model}, {_written(decoder)}, {gather_dtype}, {self.max_length}"
        """What tokens depend on besides a request's own parameters, as far as it was said here."""
        self._programs = Programs(decoder)
        self._process_group = process_group or SingleProcess()
        self._process_group.check_agreement(
            _facts(decoder, options, self._policy.hardware, combine, residual, gather_dtype)
        )
        self.engine = options.engine(self._programs, self._checkpoint.load(decoder), self._policy, self._process_group)
        self.ends = StopTokens(self.tokenizer, self._checkpoint.eos_token_ids)
        self.max_batch_size = max_batch_size

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Continue each prompt, text or token ids; one set of parameters for all, or one for each.

        Raises:
          RequestError: an empty prompt, one too long, or a token id out of the vocabulary; nothing is generated then.
        """
        request_groups = self.request_groups(prompts, params)
        total = sum(group.max_tokens * group.params.n for group in request_groups)
        with tqdm(total=total, desc="generating", unit=" tokens", disable=not progress, leave=False) as bar:
            for _, generation in self._run(request_groups):
                bar.update(generation.count_new())
                bar.set_postfix_str(str(self.stats()), refresh=False)
        return [group.output() for group in request_groups]

    def stream(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamEvent]:
        """The tokens of all prompts as they come, those of each sample in order; the last event of a sample says why it
        ended. Who stops listening cancels what has not ended.

        Raises:
          RequestError: as `generate`, before anything runs.
        """
        request_groups = self.request_groups(prompts, params)
        unasked = chain.from_iterable(group.unasked for group in request_groups)
        return chain(unasked, (group.event(generation) for group, generation in self._run(request_groups)))

    def logits(self, prompts: str | Sequence[Prompt]) -> list[Float[np.ndarray, "length vocab"]]:
        """For each prompt, the float32 logits after each of its tokens.

        Raises:
          RequestError: as `generate`.
        """
        request_groups = self.request_groups(prompts, SamplingParams(temperature=0, max_tokens=0), wants_logits=True)
        for _ in self._run(request_groups):
            pass
        return [np.concatenate(group.generations[0].prompt_output.logits) for group in request_groups]

    def warm_up(self, *, sampling: bool = True, progress: bool = False) -> None:
        """Compile all steps that `generate` and `stream` can come to need, so that none of them waits for it.

        Args:
          sampling: those of requests that do more than take the likeliest token too.
        """
        self.engine.warm_up([StepFlags(), StepFlags(sampling=True)] if sampling else [StepFlags()], progress=progress)

    def run_worker(self) -> None:
        """In all processes but the first: do what that one asks of all, until it leaves the crew.

        Raises:
          ProcessGroupError: this is the first, or the only one.
        """
        for order in self._process_group.orders():
            match order:
                case StepInput():
                    self.engine.execute(order)
                case ExplainRequest(batch_size):
                    self._explain(batch_size)

    def stats(self) -> Stats:
        """Speed, latencies, balance and use of the cache since this was made."""
        return self.engine.stats

    def explain(self, batch_size: int = 64) -> Explanation:
        """What a decode step of this many sequences does: the combine and its reason, the collectives, the bytes."""
        if batch_size < 1:
            raise RequestError(f"a decode step needs at least one sequence, got {batch_size}")
        self._process_group.broadcast(ExplainRequest(batch_size))
        return self._explain(batch_size)

    def _explain(self, batch_size: int) -> Explanation:
        counts = evenly(batch_size, self._policy.placement.size(Role.TOKENS))
        return explain(self._programs, self._policy, counts, self.max_length)

    def request_groups(
        self,
        prompts: str | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        wants_logits: bool = False,
    ) -> list[RequestGroup]:
        """Prompts with their parameters, checked and ready to begin on `engine`.

        Raises:
          RequestError: as `generate`.
        """
        encoded = self._encode(prompts)
        each = _each(params, len(encoded))
        for one in {id(one): one for one in each}.values():
            one.check(self.config.vocab_size, self.ends.of(one), self.config.diffusion)
        new_request, longest = self._kind_of_request()
        return [
            RequestGroup(
                number,
                prompt,
                one,
                max_tokens=min(one.max_tokens, longest - len(prompt)),
                has_text=self.tokenizer is not None,
                wants_logits=wants_logits,
                new_request=new_request,
            )
            for number, (prompt, one) in enumerate(zip(encoded, each, strict=True))
        ]

    def _kind_of_request(self) -> tuple[Callable[..., Request], int]:
        """How requests are made, and the most tokens, prompt included: the last of them has no position in the cache,
        but where a block is decoded at once."""
        if self.config.diffusion is None:
            return Request, self.max_length + 1
        return partial(DiffusionRequest, block=self.config.diffusion.block), self.max_length

    def finished(self, request_groups: Iterable[RequestGroup]) -> Iterator[RequestGroup]:
        """Run jobs that `request_groups` made: each when all its samples have ended."""
        request_groups = list(request_groups)
        yield from (group for group in request_groups if not group.samples)
        left = {group: group.samples for group in request_groups}
        for group, generation in self._run(request_groups):
            left[group] -= generation.finish_reason is not None
            if not left[group]:
                yield group

    def _run(self, request_groups: Iterable[RequestGroup]) -> Iterator[tuple[RequestGroup, Generation]]:
        """The samples of the jobs, each whenever it got something. Jobs begin a few at a time; those that ask for
        nothing never do."""
        queue = OutputQueue()
        open_groups: dict[Generation, RequestGroup] = {}
        coming = iter(request_groups)
        try:
            while True:
                while self.engine.waiting < self.max_batch_size and (group := next(coming, None)):
                    for generation in group.begin(self.ends, queue):
                        open_groups[generation] = group
                        self.engine.add(generation)
                if not open_groups:
                    return
                self.engine.step()
                for generation in queue.read():
                    group = open_groups[generation] if generation.finish_reason is None else open_groups.pop(generation)
                    yield group, generation
        finally:
            for generation in open_groups:
                self.engine.cancel(generation)

    def _encode(self, prompts: str | Sequence[Prompt]) -> list[list[int]]:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self._token_ids(number, prompt) for number, prompt in enumerate(prompts)]
        for number, ids in enumerate(encoded):
            if not ids:
                raise RequestError(f"prompt {number} is empty: give at least one token")
            if len(ids) > self.max_length:
                raise RequestError(f"prompt {number} has {len(ids)} tokens, a sequence can have {self.max_length}")
            if outside := [token for token in ids if not 0 <= token < self.config.vocab_size]:
                raise RequestError(
                    f"prompt {number} holds token id {outside[0]}, the ids go from 0 to {self.config.vocab_size - 1}"
                )
        return encoded

    def _token_ids(self, number: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(f"{self._checkpoint.path} has no tokenizer.json: give prompts as lists of token ids")
            try:
                return self.tokenizer.encode(prompt).ids
            except Exception as error:  # the library raises nothing more precise
                raise RequestError(
                    f"prompt {number}, {shortened(prompt)}, has text that the tokenizer has no token for"
                ) from error
        try:
            return [index(token) for token in prompt]
        except TypeError as error:
            raise RequestError(
                f"prompt {number} must be a text or a list of token ids, got {shortened(prompt)}: a prompt of token "
                "ids goes into a list of prompts"
            ) from error


def _facts(decoder: ShardedDecoder, options: Options, hardware: Hardware, *route: object) -> dict[str, str]:
    """What all processes must have been given alike."""
    return {
        "the model": f"{shortened(decoder.config)} ({_digest(decoder.config)})",
        "the hardware": str(hardware),
        "the mesh": str(decoder.placement),
        "the dtype": _written(decoder),
        "scan_layers": str(decoder.scan_layers),
        "the route": ", ".join(map(str, route)),
        "the options": str(options),
    }


def _written(decoder: ShardedDecoder) -> str:
    """The dtype, and how weights are held where it is not in that."""
    return decoder.dtype if decoder.quantization is None else f"{decoder.dtype}, {decoder.quantization}"


def _digest(config: ModelConfig) -> str:
    return hashlib.sha256(repr(config).encode()).hexdigest()[:12]


def resolve_max_length(config: ModelConfig, flags: int | None) -> int:
    """The positions of a sequence: as asked, or as many as the model was made for.

    Raises:
      RequestError: none, or more than the model was made for.
    """
    most = config.max_positions
    if flags is not None and not (isinstance(flags, int) and 1 <= flags <= most):
        raise RequestError(f"max_length must be from 1 to the {most} positions of this model, got {flags!r}")
    return flags or most


def _name(dtype: DTypeLike) -> str:
    """The dtype's name, or whatever was given in its place, for the decoder to refuse."""
    try:
        return dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        return repr(dtype)


def _each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts or not all(isinstance(each, SamplingParams) for each in params):
        raise RequestError(
            f"expected one SamplingParams, or one for each of {prompts} prompts, got {shortened(params)}"
        )
    return list(params)
