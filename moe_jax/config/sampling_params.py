"""Sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any

from moe_jax.config.decoding import BlockDiffusion
from moe_jax.errors import RequestError

MAX_TOP_LOGPROBS = 20
"""Top candidates that can be asked for beside each token."""
MAX_LOGIT_BIASES = 300
"""Entries of a `logit_bias`, as the OpenAI API has it."""
MAX_STOP_IDS = 16
"""End tokens that `min_tokens` can hold back."""
DEFAULT_CONFIDENCE_THRESHOLD = 0.95
"""The `confidence_threshold` of requests that say none."""
ENDLESS = 2**63 - 1

# Each field's bounds, both included, with what to say of them.
_WHOLE: dict[str, tuple[int, int, str]] = {
    "n": (1, ENDLESS, "1 or more"),
    "max_tokens": (0, ENDLESS, "0 or more"),
    "min_tokens": (0, ENDLESS, "0 or more"),
    "top_k": (0, ENDLESS, "positive, or 0 for all tokens"),
    "seed": (0, 2**32 - 1, "from 0 to 2**32 - 1"),
    "logprobs": (0, MAX_TOP_LOGPROBS, f"from 0 to {MAX_TOP_LOGPROBS}"),
    "prompt_logprobs": (0, MAX_TOP_LOGPROBS, f"from 0 to {MAX_TOP_LOGPROBS}"),
    "priority": (-ENDLESS, ENDLESS, "of 64 bits at most"),
    "denoising_steps": (1, ENDLESS, "1 or more"),
}
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs", "denoising_steps", "confidence_threshold")
_ABOVE_ZERO = math.ulp(0.0)
_LARGEST = float.fromhex("0x1.fffffep+127")  # of float32, in which the devices compute
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "temperature": (0, _LARGEST, "0 (greedy) or a positive number"),
    "top_p": (_ABOVE_ZERO, 1, "above 0 and at most 1"),
    "min_p": (0, 1, "from 0 to 1"),
    "repetition_penalty": (_ABOVE_ZERO, _LARGEST, "above 0, where 1 is none"),
    "presence_penalty": (-2, 2, "from -2 to 2"),
    "frequency_penalty": (-2, 2, "from -2 to 2"),
    "confidence_threshold": (0, 1, "from 0 to 1"),
}
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what is told of it.

    Tokens are chosen in this order: `logit_bias`, `repetition_penalty`, `presence_penalty` and `frequency_penalty`,
    `min_tokens`; then, unless the likeliest is taken, `temperature`, `top_k`, `top_p`, `min_p`, and a draw.

    Raises:
      RequestError: a value out of range or of the wrong type.
    """

    n: int = 1
    """Samples of the same prompt."""
    max_tokens: int = 16
    """The most tokens to generate; 0 generates nothing."""
    min_tokens: int = 0
    """No end token is chosen before so many tokens."""
    temperature: float = 1.0
    """0 always takes the likeliest token; `top_k`, `top_p`, `min_p` and `seed` then play no part."""
    top_k: int = 0
    """Keep only the likeliest k tokens, and those as likely as the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Of what `top_k` left, keep only the likeliest tokens that together reach this probability, and those as likely as
    the last of them."""
    min_p: float = 0.0
    """Keep only tokens at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in the prompt or the output, and multiplies the negative ones
    (arXiv:1909.05858); 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output, as many times as they are in it."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these token ids: from -100 to 100, for at most 300 tokens."""
    seed: int | None = None
    """The same seed draws the same tokens from the same logits, whatever else is in the batch; `None` draws a new seed
    each time."""
    stop: str | Sequence[str] | None = ()
    """Texts that end the request where the first of them appears in the output; kept as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the request, besides the model's own end tokens; kept as a tuple."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string that ended it, rather than before it."""
    ignore_eos: bool = False
    """Whether to go on past the model's own end tokens."""
    logprobs: int | None = 0
    """How many of the likeliest tokens to tell beside each generated one, with their log-probabilities; the generated
    token's own is always told, so that `None` is the same as 0."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt; `None` tells nothing of them."""
    priority: int = 0
    """Requests of higher priority overtake those that wait."""
    skip_special_tokens: bool = True
    """Whether the text leaves special tokens out."""
    denoising_steps: int | None = None
    """Of models that decode blocks: the most steps that choose the tokens of a block, of which each chooses as many as
    let the last be the last; `None` for as many as a block has tokens, so that each chooses one at least."""
    confidence_threshold: float | None = None
    """Of models that decode blocks: a token that is more probable than this, under the model, is chosen at once; 1
    keeps to `denoising_steps` alone; `None` for 0.95."""

    def __post_init__(self) -> None:
        for name, (least, most, words) in _WHOLE.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, _whole(name, value, least, most, words))
        for name, (low, high, words) in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, _number(name, value, low, high, words))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens, {self.min_tokens}, is more than max_tokens, {self.max_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(f"n must be 1 with temperature=0, as all samples are then the same, got {self.n}")

    def check(self, vocab_size: int, stop_ids: Collection[int], diffusion: BlockDiffusion | None = None) -> None:
        """Against what only the model tells.

        Args:
          end_ids: all tokens that end the request, the model's and its own.
          diffusion: how it decodes blocks, if it does.

        Raises:
          RequestError: `logit_bias` or `stop_token_ids` has a token that is not in the vocabulary, `min_tokens` has
            more end tokens to hold back than it can, or the model decodes otherwise.
        """
        if diffusion is None:
            self._check_for_tokens()
        else:
            self._check_for_blocks(diffusion)
        for name, tokens in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            if outside := [token for token in tokens if token >= vocab_size]:
                raise RequestError(f"{name} names token id {outside[0]}, the ids go from 0 to {vocab_size - 1}")
        if self.min_tokens and len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(
                f"min_tokens can hold back {MAX_STOP_IDS} end tokens, with stop_token_ids there are {len(stop_ids)}"
            )

    def _check_for_tokens(self) -> None:
        for name in ("denoising_steps", "confidence_threshold"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is for models that decode blocks: this one chooses token after token")

    def _check_for_blocks(self, diffusion: BlockDiffusion) -> None:
        if (self.denoising_steps or 1) > diffusion.block:
            raise RequestError(
                f"denoising_steps must be at most {diffusion.block}, the tokens of a block of this model, got "
                f"{self.denoising_steps}"
            )
        refused = {
            "repetition_penalty": (self.repetition_penalty != 1, "tokens of a block are chosen in any order"),
            "presence_penalty": (self.presence_penalty != 0, "tokens of a block are chosen in any order"),
            "frequency_penalty": (self.frequency_penalty != 0, "tokens of a block are chosen in any order"),
            "min_tokens": (self.min_tokens, "tokens of a block are chosen in any order"),
            "logprobs": (self.logprobs, "only the tokens chosen are told, with logprobs=0"),
            "prompt_logprobs": (self.prompt_logprobs is not None, "a token has a probability where it is masked"),
        }
        for name, (is_asked, reason) in refused.items():
            if is_asked:
                raise RequestError(f"{name} cannot be had of a model that decodes blocks: {reason}")

    @property
    def uses_penalties(self) -> bool:
        """Whether the choice of a token depends on the tokens before it, beyond the model."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether each token is simply the model's likeliest."""
        return self.temperature == 0 and not (self.uses_penalties or self.logit_bias or self.min_tokens)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _whole(name: str, value: Any, least: int, most: int, words: str) -> int:
    if not _is_whole(value):
        raise RequestError(f"{name} must be a whole number, got {shortened(value)}")
    if not least <= value <= most:
        raise RequestError(f"{name} must be {words}, got {value}")
    return int(value)


def _number(name: str, value: Any, low: float, high: float, words: str) -> float:
    if not _is_number(value):
        raise RequestError(f"{name} must be a number, got {shortened(value)}")
    if not low <= value <= high:  # which NaN is not
        raise RequestError(f"{name} must be {words}, got {value}")
    return float(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (stop,)
    if not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"stop must be a text or several, none of them empty, got {shortened(stop)}")
    return strings


def _token_ids(name: str, ids: Any) -> tuple[int, ...]:
    try:
        tokens = tuple(ids)
    except TypeError as error:
        raise RequestError(f"{name} must be token ids, got {shortened(ids)}") from error
    if not all(_is_whole(token) and token >= 0 for token in tokens):
        raise RequestError(f"{name} must be token ids, got {shortened(ids)}")
    return tuple(map(int, tokens))


def _biases(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must be a mapping from token ids to numbers, got {shortened(bias)}")
    if len(bias) > MAX_LOGIT_BIASES:
        raise RequestError(f"logit_bias can name {MAX_LOGIT_BIASES} tokens at most, got {len(bias)}")
    values = (_number(f"logit_bias[{token!r}]", value, -100, 100, "from -100 to 100") for token, value in bias.items())
    return dict(zip(_token_ids("logit_bias's keys", bias), values, strict=True))
