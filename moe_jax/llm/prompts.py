"""Check the prompts and sampling parameters of a call, and make request groups of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from reprlib import repr as shortened
from typing import Any, NotRequired, SupportsIndex, TypedDict, cast

import numpy as np
from jax import Array
from jaxtyping import Int
from tokenizers import Tokenizer

from moe_jax.checkpoints import Checkpoint
from moe_jax.config.sampling_params import SamplingParams
from moe_jax.errors import RequestError
from moe_jax.llm.request_group import RequestGroup
from moe_jax.scheduler import DiffusionRequest, Request


class TextPrompt(TypedDict):
    """Text in a dictionary, as vLLM takes it."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids in a dictionary, as vLLM takes them."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]
    """The text of the token ids; it is not read."""


TokenIds = Sequence[int] | Int[np.ndarray, " length"] | Int[Array, " length"]
Prompt = str | TokenIds | TextPrompt | TokensPrompt
"""Text or token ids, or a dictionary that holds them."""
Prompts = Prompt | Sequence[Prompt] | Int[np.ndarray, "prompts length"] | Int[Array, "prompts length"]
"""One prompt, or several."""

MIN_CHARACTERS = 2**16
"""Texts up to this length are tokenized whole."""
MAX_CHARACTERS_PER_TOKEN = 16
"""Characters for each token that a sequence can have, above which the start of a text is tokenized first."""

EXPECTED = "a text, a list of token ids, or a dictionary with one of them as 'prompt' or 'prompt_token_ids'"


def as_prompts(prompts: Prompts) -> list[Prompt]:
    """Return the prompts of a call as a list. A list of integers is one prompt.

    Raises:
      RequestError: `prompts` is neither a prompt nor a sequence.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    each: Any = _as_list(prompts)
    if each is None:
        raise RequestError(
            f"prompts must be {EXPECTED}, or a list of such prompts, got {type(prompts).__name__}: {shortened(prompts)}"
        )
    is_one = bool(each) and all(map(_is_integer, each))
    return [each] if is_one else each


def _as_list(value: object) -> list[Any] | None:
    """Return a sequence or an array as a list; `None` for anything else."""
    if hasattr(value, "__array__"):
        listed: Any = np.asarray(value).tolist()
        return listed if isinstance(listed, list) else None
    if isinstance(value, str | bytes | bytearray | memoryview) or not isinstance(value, Sequence):
        return None
    return list(value)


def make_request_groups(
    checkpoint: Checkpoint,
    max_length: int,
    prompts: Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    logits_rows: int = 0,
) -> list[RequestGroup]:
    """Make a request group for each prompt.

    Args:
      max_length: maximum positions of a sequence.
      logits_rows: number of last prompt tokens after which the logits are returned.

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
            logits_rows=logits_rows,
            new_request=new_request,
        )
        for number, (prompt, one) in enumerate(zip(encoded, params_each, strict=True))
    ]


def _encode(prompts: Sequence[Prompt], checkpoint: Checkpoint, max_length: int) -> list[list[int]]:
    """Turn prompts into token ids, and check them."""
    encoded = [_token_ids(f"prompt {number}", each, checkpoint, max_length) for number, each in enumerate(prompts)]
    vocab_size = checkpoint.config.vocab_size
    for number, ids in enumerate(encoded):
        if not ids:
            raise RequestError(f"prompt {number} is empty: give at least one token")
        if len(ids) > max_length:
            raise _too_long(f"prompt {number}", f"{len(ids)} tokens", max_length)
        if outside := [token for token in ids if not 0 <= token < vocab_size]:
            raise RequestError(f"prompt {number} holds token id {outside[0]}, the ids go from 0 to {vocab_size - 1}")
    return encoded


def _too_long(name: str, length: str, max_length: int) -> RequestError:
    return RequestError(f"{name} has {length}, a sequence can have {max_length}: shorten it, or raise max_length")


def _params_of_each(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts or not all(isinstance(each, SamplingParams) for each in params):
        raise RequestError(
            f"expected one SamplingParams, or one for each of {prompts} prompts, got {shortened(params)}"
        )
    return list(params)


def _token_ids(name: str, prompt: object, checkpoint: Checkpoint, max_length: int) -> list[int]:
    if isinstance(prompt, Mapping):
        prompt = _value(name, prompt)
    if isinstance(prompt, str):
        if checkpoint.tokenizer is None:
            raise RequestError(f"{checkpoint.path} has no tokenizer.json: give prompts as lists of token ids")
        return _tokenize(name, prompt, checkpoint.tokenizer, max_length)
    tokens = _as_list(prompt)
    if tokens is None or not all(map(_is_integer, tokens)):
        raise RequestError(f"{name} must be {EXPECTED}, got {type(prompt).__name__}: {shortened(prompt)}")
    return [index(token) for token in tokens]


def _is_integer(value: object) -> bool:
    try:
        return not isinstance(value, bool) and index(cast(SupportsIndex, value)) is not None
    except TypeError:
        return False


def _value(name: str, prompt: Mapping[str, Any]) -> object:
    """Return the text or the token ids in a dictionary; the ids, if there are both."""
    given = {key: value for key, value in prompt.items() if value is not None}
    if unknown := [key for key in given if key not in ("prompt", "prompt_token_ids")]:
        raise RequestError(f"{name} has the key {unknown[0]!r}, which is not supported: give {EXPECTED}")
    if not given:
        raise RequestError(f"{name} is a dictionary without a prompt: give {EXPECTED}")
    value = given.get("prompt_token_ids", given.get("prompt"))
    if isinstance(value, Mapping) or ("prompt_token_ids" in given and isinstance(value, str)):
        raise RequestError(f"{name} must be {EXPECTED}, got {shortened(prompt)}")
    return value


def _tokenize(name: str, text: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Tokenize a text. A text whose start has twice the tokens that fit is refused before the rest is read.

    More text changes only the last tokens of its start, so that the whole text cannot have half as many tokens.
    """
    enough = max(MIN_CHARACTERS, MAX_CHARACTERS_PER_TOKEN * max_length)
    if len(text) > enough and len(encode_text(name, text[:enough], tokenizer)) > 2 * max_length:
        raise _too_long(name, f"{len(text):,} characters and more than {2 * max_length:,} tokens", max_length)
    return encode_text(name, text, tokenizer)


def encode_text(name: str, text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenize a text. Other threads run meanwhile, which they cannot during `Tokenizer.encode`.

    Args:
      name: name of the text in errors.

    Raises:
      RequestError: the tokenizer has no token for a part of the text.
    """
    try:
        return tokenizer.encode_batch_fast([text])[0].ids
    except Exception as error:  # the library raises nothing more precise
        raise RequestError(f"{name}, {shortened(text)}, has text that the tokenizer has no token for") from error


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
