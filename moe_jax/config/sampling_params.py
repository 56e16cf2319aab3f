"""Sampling parameters of a request."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from moe_jax.config.decoding import BlockDiffusion
from moe_jax.config.sampling_values import (
    ABOVE_ZERO,
    MAX_FLOAT32,
    MAX_INT64,
    MAX_LOGIT_BIASES,
    Range,
    as_integer,
    as_logit_bias,
    as_number,
    as_stop_strings,
    as_token_ids,
)
from moe_jax.errors import RequestError

__all__ = ["DEFAULT_CONFIDENCE_THRESHOLD", "MAX_LOGIT_BIASES", "MAX_STOP_IDS", "MAX_TOP_LOGPROBS", "SamplingParams"]

MAX_TOP_LOGPROBS = 20
"""Maximum number of top log-probabilities for each token."""
MAX_STOP_IDS = 16
"""Maximum number of stop tokens that `min_tokens` can suppress."""
DEFAULT_CONFIDENCE_THRESHOLD = 0.95
"""Confidence threshold of requests that set none."""

_INTEGERS = {
    "n": Range(1, MAX_INT64, "1 or more"),
    "max_tokens": Range(0, MAX_INT64, "0 or more"),
    "min_tokens": Range(0, MAX_INT64, "0 or more"),
    "top_k": Range(0, MAX_INT64, "positive, or 0 for all tokens"),
    "seed": Range(-(2**63), 2**64 - 1, "an integer of 64 bits"),
    "logprobs": Range(0, MAX_TOP_LOGPROBS, f"from 0 to {MAX_TOP_LOGPROBS}"),
    "prompt_logprobs": Range(0, MAX_TOP_LOGPROBS, f"from 0 to {MAX_TOP_LOGPROBS}"),
    "priority": Range(-MAX_INT64, MAX_INT64, "a signed 64-bit integer"),
    "denoising_steps": Range(1, MAX_INT64, "1 or more"),
}
_NUMBERS = {
    "temperature": Range(0, MAX_FLOAT32, "0 (greedy) or a positive number"),
    "top_p": Range(ABOVE_ZERO, 1, "above 0 and at most 1"),
    "min_p": Range(0, 1, "from 0 to 1"),
    "repetition_penalty": Range(0.01, 100, "from 0.01 to 100, where 1 means no penalty"),
    "presence_penalty": Range(-2, 2, "from -2 to 2"),
    "frequency_penalty": Range(-2, 2, "from -2 to 2"),
    "confidence_threshold": Range(0, 1, "from 0 to 1"),
}
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs", "denoising_steps", "confidence_threshold")
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, with the meaning that they have in vLLM and the OpenAI API.

    Logits are changed in this order: `logit_bias`, `repetition_penalty`, `presence_penalty`, `frequency_penalty`,
    `min_tokens`. Unless decoding is greedy, `temperature`, `top_k`, `top_p` and `min_p` follow, then a random draw.

    Raises:
      RequestError: a value out of range or of the wrong type.
    """

    n: int = 1
    """Number of samples to generate for the prompt."""
    max_tokens: int = 16
    """Maximum number of tokens to generate; 0 generates nothing."""
    min_tokens: int = 0
    """Minimum number of tokens to generate before a stop token may be sampled, or a stop string may begin."""
    temperature: float = 1.0
    """Sampling temperature. 0 means greedy decoding, without `top_k`, `top_p`, `min_p` and `seed`."""
    top_k: int = 0
    """Number of most likely tokens to sample from, ties with the last included; 0 keeps all tokens."""
    top_p: float = 1.0
    """Total probability of the most likely tokens to sample from, among those that `top_k` keeps, ties with the last
    included; 1 keeps all tokens."""
    min_p: float = 0.0
    """Minimum probability of a token, relative to the most likely token; 0 keeps all tokens."""
    repetition_penalty: float = 1.0
    """Penalty on tokens in the prompt or the output: divide positive logits, multiply negative ones (CTRL,
    arXiv:1909.05858); 1 means no penalty."""
    presence_penalty: float = 0.0
    """Penalty subtracted once from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Penalty subtracted from the logits of tokens in the output, once for each occurrence."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Biases added to logits, by token id: from -100 to 100, for at most 300 tokens. Ids may be strings, as in JSON."""
    seed: int | None = None
    """Random seed of up to 64 bits, signed or unsigned. Equal seeds draw equal tokens from equal logits, in any batch;
    `None` draws a new seed. Seeds beyond 32 bits are hashed to 32 bits."""
    stop: str | Sequence[str] | None = ()
    """Strings that stop the generation when they appear in the output; stored as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that stop the generation, besides the end-of-sequence tokens of the model; stored as a tuple."""
    include_stop_str_in_output: bool = False
    """Include the stop string, or the text of the stop token, in the output text. The token ids always include it."""
    ignore_eos: bool = False
    """Continue after an end-of-sequence token of the model."""
    logprobs: int | None = 0
    """Number of top log-probabilities to return for each generated token. The log-probability of the generated token
    itself is always returned, so `None` is the same as 0."""
    prompt_logprobs: int | None = None
    """Number of top log-probabilities to return for each prompt token; `None` returns none."""
    priority: int = 0
    """Priority in the waiting queue: higher runs earlier."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the output text."""
    denoising_steps: int | None = None
    """Maximum number of denoising steps for each block of a block-diffusion model. Each step accepts enough tokens to
    finish in time; `None` means one step for each token of the block."""
    confidence_threshold: float | None = None
    """Probability above which a block-diffusion model accepts a token at once. 1 leaves the number of steps to
    `denoising_steps`; `None` means 0.95."""

    def __post_init__(self) -> None:
        for ranges, convert in ((_INTEGERS, as_integer), (_NUMBERS, as_number)):
            for name, allowed in ranges.items():
                value = getattr(self, name)
                if value is not None or name not in _OPTIONAL:
                    self._set(name, convert(name, value, allowed))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._set("stop", as_stop_strings(self.stop))
        self._set("stop_token_ids", as_token_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", as_logit_bias(self.logit_bias))
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens must be at most max_tokens, {self.max_tokens}, got {self.min_tokens}")
        if self.n > 1 and self.temperature == 0:
            raise RequestError(f"n must be 1 with temperature=0, as all samples would be equal, got {self.n}")

    def check(self, vocab_size: int, stop_ids: Collection[int], diffusion: BlockDiffusion | None = None) -> None:
        """Check the parameters against a model.

        Args:
          vocab_size: number of token ids of the model.
          stop_ids: all stop tokens of the request: `stop_token_ids` and the end-of-sequence tokens of the model.
          diffusion: block diffusion of the model; `None` if it decodes one token at a time.

        Raises:
          RequestError: a token id outside the vocabulary, more stop tokens than `min_tokens` can suppress, or a
            parameter that the decoding of the model does not support.
        """
        if diffusion is None:
            self._check_token_decoding()
        else:
            self._check_block_diffusion(diffusion)
        for name, tokens in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            if outside := [token for token in tokens if token >= vocab_size]:
                raise RequestError(f"{name} has token id {outside[0]}, but ids go from 0 to {vocab_size - 1}")
        if self.min_tokens and len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(
                f"min_tokens allows at most {MAX_STOP_IDS} stop tokens, got {len(stop_ids)}: use fewer stop_token_ids"
            )

    def _check_token_decoding(self) -> None:
        for name in ("denoising_steps", "confidence_threshold"):
            if getattr(self, name) is not None:
                raise RequestError(f"{name} is for models that decode blocks; this model decodes one token at a time")

    def _check_block_diffusion(self, diffusion: BlockDiffusion) -> None:
        if (self.denoising_steps or 1) > diffusion.block:
            raise RequestError(
                f"denoising_steps must be at most {diffusion.block}, the block size of this model, got "
                f"{self.denoising_steps}"
            )
        any_order = "tokens of a block are generated in any order"
        unsupported = {
            "repetition_penalty": (self.repetition_penalty != 1, any_order),
            "presence_penalty": (self.presence_penalty != 0, any_order),
            "frequency_penalty": (self.frequency_penalty != 0, any_order),
            "min_tokens": (self.min_tokens, any_order),
            "logprobs": (self.logprobs, "only the tokens chosen have log-probabilities, set logprobs=0"),
            "prompt_logprobs": (self.prompt_logprobs is not None, "a token has a probability only where it is masked"),
        }
        for name, (is_set, reason) in unsupported.items():
            if is_set:
                raise RequestError(f"{name} is not supported by models that decode blocks: {reason}")

    @property
    def uses_penalties(self) -> bool:
        """True if sampling depends on the previous tokens through a penalty."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def is_plain_greedy(self) -> bool:
        """True if each token is the argmax of the unchanged logits."""
        return self.temperature == 0 and not (self.uses_penalties or self.logit_bias or self.min_tokens)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
