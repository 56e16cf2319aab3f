"""Check the prompts and sampling parameters of a call, and make request groups of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import index
from reprlib import repr as shortened

from moe_jax.checkpoints import Checkpoint
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.request_group import RequestGroup
from moe_jax.scheduler import DiffusionRequest, Request

Prompt = str | Sequence[int]
"""Text or token ids."""


def make_request_groups(
    checkpoint: Checkpoint,
    max_length: int,
    prompts: str | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    wants_logits: bool = False,
) -> list[RequestGroup]:
    """Make a request group for each prompt.

    Args:
      max_length: maximum positions of a sequence.
      wants_logits: return the logits after each prompt token.

    Raises:
      RequestError: a prompt is empty or too long, or has a token outside the vocabulary; or sampling parameters do not
        fit the model.
    """
    config = checkpoint.config
    encoded = _encode(prompts, checkpoint, max_length)
    params_each = _params_of_each(params, len(encoded))
    unique = {id(one): one for one in params_each}
    stop_ids = {key: _stop_ids(one, checkpoint) for key, one in unique.items()}
    for key, one in unique.items():
        one.check(config.vocab_size, stop_ids[key], config.diffusion)
    new_request, longest = _request_type(checkpoint, max_length)
    return [
        RequestGroup(
            number,
            prompt,
            one,
            max_tokens=min(one.max_tokens, longest - len(prompt)),
            stop_ids=stop_ids[id(one)],
            tokenizer=checkpoint.tokenizer,
            wants_logits=wants_logits,
            new_request=new_request,
        )
        for number, (prompt, one) in enumerate(zip(encoded, params_each, strict=True))
    ]


def _encode(prompts: str | Sequence[Prompt], checkpoint: Checkpoint, max_length: int) -> list[list[int]]:
    """Turn prompts into token ids, and check them."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    encoded = [_token_ids(number, prompt, checkpoint) for number, prompt in enumerate(prompts)]
    vocab_size = checkpoint.config.vocab_size
    for number, ids in enumerate(encoded):
        if not ids:
            raise RequestError(f"prompt {number} is empty: give at least one token")
        if len(ids) > max_length:
            raise RequestError(f"prompt {number} has {len(ids)} tokens, a sequence can have {max_length}")
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise RequestError(f"prompt {number} holds token id {outside[0]}, the ids go from 0 to {vocab_size - 1}")
    return encoded


def _params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts or not all(isinstance(each, SamplingParams) for each in params):
        raise RequestError(
            f"expected one SamplingParams, or one for each of {prompts} prompts, got {shortened(params)}"
        )
    return list(params)


def _token_ids(number: int, prompt: Prompt, checkpoint: Checkpoint) -> list[int]:
    if isinstance(prompt, str):
        if checkpoint.tokenizer is None:
            raise RequestError(f"{checkpoint.path} has no tokenizer.json: give prompts as lists of token ids")
        try:
            return checkpoint.tokenizer.encode(prompt).ids
        except Exception as error:  # the library raises nothing more precise
            raise RequestError(
                f"prompt {number}, {shortened(prompt)}, has text that the tokenizer has no token for"
            ) from error
    try:
        return [index(token) for token in prompt]
    except TypeError as error:
        raise RequestError(
            f"prompt {number} must be a text or a list of token ids, got {shortened(prompt)}: for a single prompt of "
            "token ids, give a list that holds the prompt"
        ) from error


def _stop_ids(params: SamplingParams, checkpoint: Checkpoint) -> frozenset[int]:
    eos_token_ids = frozenset() if params.ignore_eos else checkpoint.eos_token_ids
    return frozenset(params.stop_token_ids) | eos_token_ids


def _request_type(checkpoint: Checkpoint, max_length: int) -> tuple[Callable[..., Request], int]:
    """Return the constructor of requests, and the maximum tokens of a sequence, prompt included.

    The last token of a sequence needs no position in the cache, except in block diffusion.
    """
    if checkpoint.config.diffusion is None:
        return Request, max_length + 1
    return partial(DiffusionRequest, block=checkpoint.config.diffusion.block), max_length
