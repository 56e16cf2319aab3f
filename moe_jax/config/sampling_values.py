"""Checks of single sampling parameters: each returns the value in its stored type, or raises `RequestError`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any, NamedTuple

from moe_jax.errors import RequestError

MAX_LOGIT_BIASES = 300
"""Maximum number of entries in `logit_bias`, as in the OpenAI API."""
MAX_INT64 = 2**63 - 1
ABOVE_ZERO = math.ulp(0.0)
"""Smallest positive number."""
MAX_FLOAT32 = float.fromhex("0x1.fffffep+127")
"""Largest finite float32, the dtype of sampling on the devices."""


class Range(NamedTuple):
    """Allowed values of a parameter."""

    low: float
    """Smallest allowed value."""
    high: float
    """Largest allowed value."""
    description: str
    """Allowed values in words: the end of the sentence "the parameter must be"."""


def as_integer(name: str, value: Any, allowed: Range) -> int:
    """Return the value as an `int` within its range."""
    if not _is_integer(value):
        raise RequestError(f"{name} must be a whole number, got {shortened(value)}")
    _check_range(name, value, allowed)
    return int(value)


def as_number(name: str, value: Any, allowed: Range) -> float:
    """Return the value as a `float` within its range."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, got {shortened(value)}")
    _check_range(name, value, allowed)
    return float(value)


def as_stop_strings(stop: Any) -> tuple[str, ...]:
    """Return one stop string or several as a tuple; `None` as an empty tuple."""
    if stop is None:
        return ()
    strings = tuple(stop) if isinstance(stop, Sequence) and not isinstance(stop, str) else (stop,)
    if not all(isinstance(string, str) and string for string in strings):
        raise RequestError(f"stop must be a string or a list of strings, none of them empty, got {shortened(stop)}")
    return strings


def as_token_ids(name: str, ids: Any) -> tuple[int, ...]:
    """Return token ids as a tuple."""
    try:
        tokens = tuple(ids)
    except TypeError as error:
        raise RequestError(f"{name} must be token ids, got {shortened(ids)}") from error
    if not all(_is_integer(token) and token >= 0 for token in tokens):
        raise RequestError(f"{name} must be token ids, got {shortened(ids)}")
    return tuple(map(int, tokens))


def as_logit_bias(biases: Any) -> dict[int, float]:
    """Return biases by token id, each from -100 to 100, as a new dictionary."""
    if not isinstance(biases, Mapping):
        raise RequestError(f"logit_bias must be a mapping from token ids to numbers, got {shortened(biases)}")
    if len(biases) > MAX_LOGIT_BIASES:
        raise RequestError(f"logit_bias can have at most {MAX_LOGIT_BIASES} tokens, got {len(biases)}")
    ids = [int(token) if isinstance(token, str) and token.isdecimal() else token for token in biases]
    tokens, allowed = as_token_ids("logit_bias's keys", ids), Range(-100, 100, "from -100 to 100")
    if len(set(tokens)) < len(tokens):
        raise RequestError(f"logit_bias names a token twice, got {shortened(biases)}")
    values = (as_number(f"logit_bias[{token!r}]", value, allowed) for token, value in biases.items())
    return dict(zip(tokens, values, strict=True))


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_range(name: str, value: Any, allowed: Range) -> None:
    if not allowed.low <= value <= allowed.high:  # NaN fails the comparison, too
        raise RequestError(f"{name} must be {allowed.description}, got {value}")
