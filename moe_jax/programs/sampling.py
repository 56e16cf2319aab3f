"""From logits to the next token, for many requests at once, each with its own parameters, on shards of the vocabulary.

Q  requests     V  columns of the vocabulary that this device holds     h  heads devices, which share the vocabulary
P  positions    m  thresholds tried at once     C  top candidates

Runs inside `shard_map`, on logits as the LM head leaves them: no device sees those of the whole vocabulary. What is
gathered or summed over the heads devices is a few numbers for each request, from which all come to the same results.
A draw depends on nothing but the request's own logits, parameters, seed and number of tokens: not on its neighbours,
nor, up to the rounding of sums, on the placement.

Nothing is sorted: what top-k and top-p cut off lies below a threshold, which bisection finds (`_highest`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped, UInt32

from moe_jax.config.sampling_params import MAX_LOGIT_BIASES, MAX_STOP_IDS, SamplingParams
from moe_jax.sharding import Placement, Role
from moe_jax.sharding.collectives import all_gather_same, sum_devices, vary_alike
from moe_jax.sharding.rows import on_host

ALL = 2**31 - 1
"""More tokens than any vocabulary or sequence has."""
NOWHERE = -1
"""A token id of no vocabulary."""
BITS = 2
"""Of a threshold, found in one pass over the logits."""
BLOCK = 128
"""Columns among which a draw chooses at once."""

Tree = TypeVar("Tree")


class SamplingRequest(Protocol):
    """A request, as far as the choice of its tokens depends on it."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def seed(self) -> int: ...

    @property
    def prompt(self) -> Sequence[int]: ...

    @property
    def stop_ids(self) -> Collection[int]:
        """All tokens that end it, the model's and its own."""
        ...


class SamplingMetadata(NamedTuple):
    """The parameters of Q requests, as arrays."""

    temperature: Float[Array, "Q"]
    top_k: Int32[Array, "Q"]
    top_p: Float[Array, "Q"]
    min_p: Float[Array, "Q"]
    repetition: Float[Array, "Q"]
    presence: Float[Array, "Q"]
    frequency: Float[Array, "Q"]
    seed: UInt32[Array, "Q"]
    min_tokens: Int32[Array, "Q"]
    prompt_length: Int32[Array, "Q"]
    bias_ids: Int32[Array, "Q biases"]
    bias_values: Float[Array, "Q biases"]
    stop_ids: Int32[Array, "Q ends"]
    """The tokens that end a request, and that `min_tokens` holds back; the first `MAX_STOP_IDS` of them. In this and
    `bias_ids`, `NOWHERE` fills what is left."""

    @classmethod
    def of(cls, requests: Sequence[SamplingRequest | None]) -> SamplingMetadata:
        """The knobs of requests, greedy ones where there is none. Their shapes depend on nothing but Q."""
        columns = zip(*map(_row, requests), strict=True)
        return cls(*(on_host(np.array(column, dtype)) for column, dtype in zip(columns, _DTYPES, strict=True)))


_F, _I, _U = np.float32, np.int32, np.uint32
_DTYPES = (_F, _I, _F, _F, _F, _F, _F, _U, _I, _I, _I, _F, _I)


class TokenLogprobs(NamedTuple):
    """Of the tokens at some places, all under the unmodified logits."""

    logprobs: Float[Array, "Q"]
    """Natural log-probabilities of the tokens."""
    top_tokens: Int32[Array, "Q C"]
    """The likeliest tokens there, likeliest first, of equals the lowest id; `NOWHERE` beyond the vocabulary."""
    top_logprobs: Float[Array, "Q C"]


class SamplerOutput(NamedTuple):
    tokens: Int32[Array, "Q"]
    logprobs: Float[Array, "Q"]
    """This and what follows: see `TokenLogprobs`."""
    top_tokens: Int32[Array, "Q C"]
    top_logprobs: Float[Array, "Q C"]


class SamplerInputs(NamedTuple):
    """What the choice of each request's token depends on besides its logits."""

    sampling: SamplingMetadata
    generated: Int32[Array, "Q"]
    """How many tokens each request has generated."""
    history: Int32[Array, "Q P"] | None
    """The tokens of each request by position, first its prompt, then those generated; what follows may be anything.
    `None` where no request has a penalty."""


def sample(
    logits: Float[Array, "Q V"],
    vocab_size: int,
    placement: Placement,
    drawing: SamplerInputs | None,
    *,
    never: int | None = None,
    top: int = 0,
) -> SamplerOutput:
    """The next token of each request: drawn where its temperature is above 0, else the likeliest, the lowest id first.

    Args:
      logits: float32; columns beyond `vocab_size` are padding, whatever they hold.
      drawing: `None` where all are greedy, without anything that changes logits.
      never: a token that counts as none: it is as improbable as can be.
      top: C.
    """
    columns = _Columns.of(logits, vocab_size, placement)
    logits = columns.without_padding(logits)
    if never is not None:
        logits = columns.without(never, logits)
    if drawing is None:
        _, tokens = _likeliest(logits, columns)
    else:
        sampling, generated, history = drawing
        with jax.named_scope("change"):
            changed = _changed(logits, columns, sampling, generated, history)
        best, greedy = _likeliest(changed, columns)
        with jax.named_scope("draw"):
            hot = sampling.temperature > 0
            tokens = lax.cond(
                hot.any(),
                lambda: jnp.where(hot, _draw(changed, best, columns, sampling, generated), greedy),
                lambda: greedy,
            )
    return SamplerOutput(tokens, *_token_logprobs(logits, tokens, columns, top))


def logprobs_of(
    logits: Float[Array, "Q V"], tokens: Int32[Array, "Q"], vocab_size: int, placement: Placement, *, top: int = 0
) -> TokenLogprobs:
    """The log-probability of each token, and the `top` likeliest in its place."""
    columns = _Columns.of(logits, vocab_size, placement)
    return _token_logprobs(columns.without_padding(logits), tokens, columns, top)


@dataclass(frozen=True)
class _Columns:
    """The columns of the vocabulary that this device holds, and the way to the others'."""

    placement: Placement
    vocab_size: int
    held: int
    first: Array | int

    @classmethod
    def of(cls, logits: Float[Array, "Q V"], vocab_size: int, placement: Placement) -> _Columns:
        held = logits.shape[1]
        return cls(placement, vocab_size, held, placement.index(Role.HEADS) * held)

    def without_padding(self, logits: Float[Array, "Q V"]) -> Float[Array, "Q V"]:
        if self.held * self.placement.size(Role.HEADS) == self.vocab_size:
            return logits
        return jnp.where(self.first + jnp.arange(self.held) < self.vocab_size, logits, -jnp.inf)

    def without(self, token: int, logits: Float[Array, "Q V"]) -> Float[Array, "Q V"]:
        return jnp.where(self.first + jnp.arange(self.held) == token, -jnp.inf, logits)

    def here(self, tokens: Int32[Array, "..."]) -> Bool[Array, "..."]:
        return (tokens >= self.first) & (tokens < self.first + self.held)

    def local(self, tokens: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """Their columns on this device, or one too many where it does not hold them, for scatters to drop."""
        return jnp.where(self.here(tokens), tokens - self.first, self.held)

    def of_all(self, value: Shaped[Array, "..."]) -> Shaped[Array, "h ..."]:
        """A small value of each heads device: `[...] {V:heads} -> [h, ...]`."""
        return all_gather_same(value[None], self.placement.axes(Role.HEADS))

    def total(self, tree: Tree) -> Tree:
        """A small value, added up over the heads devices: `[...] {V:heads} -> [...]`."""
        return sum_devices(tree, self.placement.axes(Role.HEADS))


def _likeliest(logits: Float[Array, "Q V"], columns: _Columns) -> tuple[Float[Array, "Q"], Int32[Array, "Q"]]:
    """The highest logit and its token, the lowest id where several are as high."""
    column = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best = columns.of_all(jnp.take_along_axis(logits, column[:, None], axis=-1)[:, 0])
    tokens = columns.of_all(columns.first + column)
    device = jnp.argmax(best, axis=0)[None]
    return jnp.take_along_axis(best, device, axis=0)[0], jnp.take_along_axis(tokens, device, axis=0)[0]


def _token_logprobs(
    logits: Float[Array, "Q V"], tokens: Int32[Array, "Q"], columns: _Columns, top: int
) -> TokenLogprobs:
    total = jax.nn.logsumexp(columns.of_all(jax.nn.logsumexp(logits, axis=-1)), axis=0)
    here = columns.here(tokens)
    found = jnp.take_along_axis(logits, jnp.where(here, columns.local(tokens), 0)[:, None], axis=-1)[:, 0]
    chosen = columns.total(jnp.where(here, found, 0))
    top_tokens, top_logits = _top(logits, columns, top)
    return TokenLogprobs(chosen - total, top_tokens, top_logits - total[:, None])


def _top(logits: Float[Array, "Q V"], columns: _Columns, top: int) -> tuple[Int32[Array, "Q C"], Float[Array, "Q C"]]:
    """The `top` likeliest tokens and their logits: the best of the best of each device."""
    if not top:
        return jnp.zeros((logits.shape[0], 0), jnp.int32), jnp.zeros((logits.shape[0], 0))
    values, at = lax.top_k(logits, min(top, columns.held))
    axes = columns.placement.axes(Role.HEADS)
    values, tokens = (all_gather_same(part, axes, dim=1) for part in (values, columns.first + at))
    missing = max(top - values.shape[1], 0)
    values = jnp.pad(values, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    values, at = lax.top_k(values, top)
    tokens = jnp.take_along_axis(jnp.pad(tokens, ((0, 0), (0, missing))), at, axis=1)
    return jnp.where(values > -jnp.inf, tokens, NOWHERE), values


def _changed(
    logits: Float[Array, "Q V"],
    columns: _Columns,
    sampling: SamplingMetadata,
    generated: Int32[Array, "Q"],
    history: Int32[Array, "Q P"] | None,
) -> Float[Array, "Q V"]:
    """The logits after biases, penalties, and what `min_tokens` forbids; each step skipped where nobody asks for it."""
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = lax.cond(
        (sampling.bias_values != 0).any(),
        lambda: logits.at[rows, columns.local(sampling.bias_ids)].add(sampling.bias_values, mode="drop"),
        lambda: logits,
    )
    if history is not None:
        flags = (sampling.repetition != 1) | (sampling.presence != 0) | (sampling.frequency != 0)
        logits = lax.cond(
            flags.any(), lambda: _penalised(logits, columns, sampling, generated, history), lambda: logits
        )
    early = generated < sampling.min_tokens
    ends = jnp.where(early[:, None], columns.local(sampling.stop_ids), columns.held)
    return lax.cond(early.any(), lambda: logits.at[rows, ends].set(-jnp.inf, mode="drop"), lambda: logits)


def _penalised(
    logits: Float[Array, "Q V"],
    columns: _Columns,
    sampling: SamplingMetadata,
    generated: Int32[Array, "Q"],
    history: Int32[Array, "Q P"],
) -> Float[Array, "Q V"]:
    position, prompt = jnp.arange(history.shape[1]), sampling.prompt_length[:, None]
    real = position < prompt + generated[:, None]
    rows, at = jnp.arange(logits.shape[0])[:, None], columns.local(history)
    never = jnp.zeros_like(logits, jnp.int32)
    seen = never.at[rows, at].max(real.astype(jnp.int32), mode="drop") > 0
    times = never.at[rows, at].add((real & (position >= prompt)).astype(jnp.int32), mode="drop")
    repetition = sampling.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - sampling.presence[:, None] * (times > 0) - sampling.frequency[:, None] * times


def _draw(
    logits: Float[Array, "Q V"],
    best: Float[Array, "Q"],
    columns: _Columns,
    sampling: SamplingMetadata,
    generated: Int32[Array, "Q"],
) -> Int32[Array, "Q"]:
    """A token of each request by the inverse of its distribution function: of the device in which the uniform number of
    the request falls, the block in which it falls, and there the token. Every device finds the token that it would be,
    and the right one tells."""
    weights = _weights(logits, best, columns, sampling)
    blocks = jnp.pad(weights, ((0, 0), (0, -columns.held % BLOCK))).reshape(weights.shape[0], -1, BLOCK)
    masses = blocks.sum(axis=-1)
    of_devices = columns.of_all(masses.sum(axis=-1)).T
    device, rest = _fall(of_devices, jax.vmap(_uniform)(sampling.seed, generated) * of_devices.sum(axis=-1))
    block, rest = _fall(masses, rest)
    column, _ = _fall(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], rest)
    token = columns.first + block * BLOCK + column
    return columns.total(jnp.where(device == columns.placement.index(Role.HEADS), token, 0))


def _uniform(seed: UInt32[Array, ""], generated: Int32[Array, ""]) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), generated))


def _fall(masses: Float[Array, "Q n"], target: Float[Array, "Q"]) -> tuple[Int32[Array, "Q"], Float[Array, "Q"]]:
    """Into which of the masses, laid end to end, each target falls, and how far.

    However sums are rounded, it is one that has a mass, if any has.
    """
    ends = jnp.cumsum(masses, axis=-1)
    starts = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    reached = (starts <= target[:, None]) & (masses > 0)
    which = jnp.where(reached, jnp.arange(masses.shape[1], dtype=jnp.int32), 0).max(axis=-1)
    start = jnp.take_along_axis(starts, which[:, None], axis=-1)[:, 0]
    return which, jnp.maximum(target - start, 0)


def _weights(
    logits: Float[Array, "Q V"], best: Float[Array, "Q"], columns: _Columns, sampling: SamplingMetadata
) -> Float[Array, "Q V"]:
    """How likely the tokens are after the temperature, relative to the likeliest; 0 for those that are cut off."""
    temperature = jnp.clip(sampling.temperature, jnp.finfo(jnp.float32).tiny)[:, None]
    weights = jnp.exp((logits - best[:, None]) / temperature)
    cut = vary_alike(jnp.full(best.shape, -jnp.inf), best, sampling.top_k)[0]
    cut = lax.cond((sampling.top_k > 0).any(), lambda: _top_k_cut(logits, columns, sampling.top_k), lambda: cut)
    cut = lax.cond(
        (sampling.top_p < 1).any(),
        lambda: jnp.maximum(cut, _top_p_cut(logits, weights, cut, columns, sampling.top_p)),
        lambda: cut,
    )
    kept = (logits >= jnp.minimum(cut, best)[:, None]) & (weights >= sampling.min_p[:, None])
    return jnp.where(kept, weights, 0)


def _top_k_cut(logits: Float[Array, "Q V"], columns: _Columns, top_k: Int32[Array, "Q"]) -> Float[Array, "Q"]:
    """The k-th highest logit."""
    wanted = jnp.where(top_k > 0, top_k, ALL)[:, None]

    def enough(thresholds: Float[Array, "Q m"]) -> Bool[Array, "Q m"]:
        above = logits[:, None] >= thresholds[..., None]
        return columns.total(above.sum(axis=-1, dtype=jnp.int32)) >= wanted

    return _highest(enough, top_k)


def _top_p_cut(
    logits: Float[Array, "Q V"],
    weights: Float[Array, "Q V"],
    cut: Float[Array, "Q"],
    columns: _Columns,
    top_p: Float[Array, "Q"],
) -> Float[Array, "Q"]:
    """The lowest logit of the likeliest tokens that together weigh `top_p` of what is above the cut."""
    weights = jnp.where(logits >= cut[:, None], weights, 0)
    wanted = jnp.where(top_p < 1, top_p * columns.total(weights.sum(axis=-1)), jnp.inf)[:, None]

    def enough(thresholds: Float[Array, "Q m"]) -> Bool[Array, "Q m"]:
        above = jnp.where(logits[:, None] >= thresholds[..., None], weights[:, None], 0)
        return columns.total(above.sum(axis=-1)) >= wanted

    return _highest(enough, top_p)


def _highest(
    enough: Callable[[Float[Array, "Q m"]], Bool[Array, "Q m"]], like: Shaped[Array, "Q"]
) -> Float[Array, "Q"]:
    """The highest threshold of each request for which there is enough above; minus infinity where there never is.

    Found from its first bits to its last, `BITS` at a time: numbers of as many bits are ordered as floats are.
    """
    digits = jnp.arange(1, 2**BITS, dtype=jnp.uint32)

    def refine(step: Array, found: UInt32[Array, "Q"]) -> UInt32[Array, "Q"]:
        place = (32 - BITS * (step + 1)).astype(jnp.uint32)
        digit = enough(_float(found[:, None] + (digits << place))).sum(axis=-1, dtype=jnp.uint32)
        return found + (digit << place)

    return _float(lax.fori_loop(0, 32 // BITS, refine, jnp.zeros_like(like, jnp.uint32)))


def _float(order: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """The float32 at a place in their order from minus to plus infinity; beyond these, they."""
    lowest, highest, sign = jnp.array([0x007FFFFF, 0xFF800000, 0x80000000], jnp.uint32)
    order = jnp.clip(order, lowest, highest)
    bits = jnp.where(order >= sign, order - sign, ~order)
    return lax.bitcast_convert_type(bits, jnp.float32)


class _Idle(NamedTuple):
    """The place of no request."""

    params: SamplingParams = SamplingParams(temperature=0)
    seed: int = 0
    prompt: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()


def _row(request: SamplingRequest | None) -> tuple[Any, ...]:
    """The fields of `SamplingMetadata`, of one request."""
    request = request or _Idle()
    params, bias = request.params, request.params.logit_bias or {}
    return (
        params.temperature,
        min(params.top_k, ALL),
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        request.seed,
        min(params.min_tokens, ALL),
        len(request.prompt),
        _padded(bias, MAX_LOGIT_BIASES, NOWHERE),
        _padded(bias.values(), MAX_LOGIT_BIASES, 0),
        _padded(sorted(request.stop_ids)[:MAX_STOP_IDS], MAX_STOP_IDS, NOWHERE),
    )


def _padded(values: Collection[float], width: int, fill: int) -> np.ndarray:
    padded = np.full(width, fill, np.float64)
    padded[: len(values)] = list(values)
    return padded
