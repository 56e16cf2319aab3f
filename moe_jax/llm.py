"""The public face: a checkpoint on a mesh, prompts in, texts out."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from reprlib import repr as shortened
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float
from tqdm import tqdm

from moe_jax.bundled import ADDER
from moe_jax.checkpoints import Checkpoint
from moe_jax.config import ModelConfig
from moe_jax.engine import Engine, Request, Throughput
from moe_jax.errors import RequestError
from moe_jax.explain import Explanation, evenly, explain
from moe_jax.models import ShardedDecoder
from moe_jax.requests import RequestOutput, SamplingParams
from moe_jax.sharding import Hardware, Placement, Residual, Role, Strategy, as_hardware, as_placement

Prompt = str | Sequence[int]
T = TypeVar("T")


class LLM:
    """Decodes one checkpoint in batches.

    Args:
      checkpoint: a directory in Hugging Face layout, or one that `moe-jax convert` wrote; by default the bundled model,
        which adds numbers.
      mesh: `"data=2,expert=4"` (axes left out have size 1), axis sizes, a mesh or a `Placement`; by default all devices
        on `expert`.
      dtype: of weights, cache and computation; by default what the checkpoint says.
      combine: `"auto"`, `"scatter"`, `"reduce"`, `"ragged"`, `"all-to-all"`, or a class derived from
        `moe_jax.sharding.Combine`.
      residual: where attention heads are split over devices, whether each keeps the `"whole"` rows of its token shard
        between blocks or they `"split"` them (sequence parallelism); `"auto"` weighs both.
      gather_dtype: how rows are sent to feed-forward blocks: `"exact"`, or with less precision `"float8_e4m3fn"` or
        `"int8"`. Sums are always exact.
      hardware: what the policy reckons with: a name such as `"h100"`, a file that `moe-jax bench --calibrate` wrote, or
        a `moe_jax.sharding.Hardware`; by default that of the devices.
      max_length: the most positions of a sequence, prompt included; by default those the model was made for. The last
        token that is generated takes none.
      max_batch_size: sequences decoded together; more wait.

    Raises:
      CheckpointError, ConfigError, PlacementError: see `moe_jax.errors`.
    """

    def __init__(
        self,
        checkpoint: str | Path = ADDER,
        *,
        mesh: str | Mapping[str, int] | Mesh | Placement | None = None,
        dtype: DTypeLike | None = None,
        combine: str | Strategy = "auto",
        residual: str | type[Residual] = "auto",
        gather_dtype: str = "exact",
        hardware: str | Hardware | None = None,
        max_length: int | None = None,
        max_batch_size: int = 256,
    ) -> None:
        self._checkpoint = Checkpoint(checkpoint)
        self.config, self.tokenizer = self._checkpoint.config, self._checkpoint.tokenizer
        self.max_length = checked_length(self.config, max_length)
        if max_batch_size < 1:
            raise RequestError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.max_batch_size = max_batch_size
        placement = as_placement(mesh)
        decoder = ShardedDecoder(self.config, placement, _name(dtype or self._checkpoint.dtype))
        self._policy = decoder.policy(as_hardware(hardware), combine, residual, gather_dtype)
        self._engine = Engine(decoder, self._checkpoint.load(decoder), self._policy)

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
        encoded = self._encode(prompts)
        requests = [self._request(prompt, p) for prompt, p in zip(encoded, _each(params, len(encoded)), strict=True)]
        wanted = [request for request in requests if request.most_tokens]
        total = sum(request.most_tokens for request in wanted)
        with tqdm(total=total, desc="generating", unit=" tokens", disable=not progress, leave=False) as bar:
            for wave in _waves(wanted, self.max_batch_size):
                for given in self._engine.generate(wave):
                    bar.update(given)
        return [self._output(request) for request in requests]

    def logits(self, prompts: str | Sequence[Prompt]) -> list[Float[np.ndarray, "length vocab"]]:
        """For each prompt, the float32 logits after each of its tokens.

        Raises:
          RequestError: as `generate`.
        """
        return [
            logits
            for wave in _waves(self._encode(prompts), self.max_batch_size)
            for logits in self._engine.logits(wave)
        ]

    def explain(self, batch_size: int = 64) -> Explanation:
        """What a decode step of this many sequences does: the combine and its reason, the collectives, the bytes."""
        if batch_size < 1:
            raise RequestError(f"a decode step needs at least one sequence, got {batch_size}")
        counts = evenly(batch_size, self._policy.placement.size(Role.TOKENS))
        return explain(self._engine.programs, self._policy, counts, self.max_length)

    @property
    def throughput(self) -> Throughput:
        """Tokens and seconds of all calls of `generate` so far, compilation not counted."""
        return self._engine.throughput

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
                f"prompt {number} must be a text or a list of token ids, got {shortened(prompt)}"
            ) from error

    def _request(self, prompt: list[int], params: SamplingParams) -> Request:
        return Request(
            prompt=prompt,
            params=params,
            seed=secrets.randbits(32) if params.seed is None else params.seed,
            end_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else self._checkpoint.end_token_ids),
            most_tokens=min(params.max_tokens, self.max_length - len(prompt) + 1),
        )

    def _output(self, request: Request) -> RequestOutput:
        return RequestOutput(
            prompt_token_ids=list(request.prompt),
            token_ids=request.tokens,
            logprobs=request.logprobs,
            finish_reason=request.finish_reason or "length",
            text=self.tokenizer.decode(request.tokens) if self.tokenizer else None,
        )


def checked_length(config: ModelConfig, asked: int | None) -> int:
    """The positions of a sequence: as asked, or as many as the model was made for.

    Raises:
      RequestError: none, or more than the model was made for.
    """
    most = config.max_positions
    if asked is not None and not 1 <= asked <= most:
        raise RequestError(f"max_length must be from 1 to the {most} positions of this model, got {asked}")
    return asked or most


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


def _waves(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))
