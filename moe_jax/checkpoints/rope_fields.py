"""Rotary embedding as `config.json` describes it.

Older files have `rope_theta`, `partial_rotary_factor` and `rope_scaling`, newer ones all of it in `rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from moe_jax.checkpoints.fields import Fields
from moe_jax.config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)

OLD, NEW = "rope_scaling", "rope_parameters"


def read_rope(
    fields: Fields, head_dim: int, *, theta: float, fraction: float = 1.0, interleaved: bool = False
) -> RopeConfig:
    """The rotary embedding of heads of this width.

    Args:
      theta: the base, where the file has none.
      fraction: how much of a head is rotated, where the file does not say.
    """
    theta = fields.take("rope_theta", float, theta)
    fraction = fields.take("partial_rotary_factor", float, fraction)
    return described(fields, rope_object(fields), head_dim, theta, fraction, interleaved)


def read_rope_of(fields: Fields, layers: str, head_dim: int, *, fraction: float = 1.0) -> RopeConfig:
    """That of layers of a kind, where `rope_parameters` has an object for each kind."""
    rope = fields.inner(NEW).inner(layers)
    return described(fields, rope, head_dim, rope.take("rope_theta", float), fraction)


def described(
    fields: Fields, rope: Fields, head_dim: int, theta: float, fraction: float, interleaved: bool = False
) -> RopeConfig:
    """That which an object of the file describes; base and fraction are those where it does not say."""
    kind = rope.any("rope_type", rope.any("type", "default"))
    rope.any("type", None)
    theta = rope.take("rope_theta", float, theta)
    fraction = rope.take("partial_rotary_factor", float, fraction)
    width = int(head_dim * fraction)
    if not isinstance(kind, str) or kind not in SCALINGS:
        fields.problem(f"rotary embedding of type {kind!r} is not supported (only {', '.join(SCALINGS)})")
        return RopeConfig(theta)
    return RopeConfig(theta, None if width == head_dim else width, interleaved, SCALINGS[kind](fields, rope))


def rope_object(fields: Fields) -> Fields:
    """Where the scaling is described."""
    if fields.has(OLD) and fields.has(NEW):
        fields.problem(f"{OLD} and {NEW} are two descriptions of one thing: remove one")
    old, new = fields.inner(OLD), fields.inner(NEW)
    return old if fields.has(OLD) else new


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies with to make up for a softmax over more positions: `0.1 * scale * ln(factor) + 1`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _linear(fields: Fields, rope: Fields) -> RopeScaling | None:
    return LinearScaling(rope.take("factor", float))


def _dynamic(fields: Fields, rope: Fields) -> RopeScaling | None:
    """The form with a fixed `alpha`; the other one starts to scale beyond the longest sequence, where lengths end."""
    for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        rope.any(name, None)
    alpha = rope.take_optional("alpha", float)
    return None if alpha is None else NTKScaling(alpha)


def _yarn(fields: Fields, rope: Fields) -> RopeScaling | None:
    longest, original = _positions(fields, rope)
    factor = rope.take("factor", float, longest / original)
    magnitude, score_magnitude = (rope.take_optional(name, float) for name in ("mscale", "mscale_all_dim"))
    if magnitude and score_magnitude:
        amplitude = yarn_magnitude(factor, magnitude) / yarn_magnitude(factor, score_magnitude)
    else:
        amplitude = yarn_magnitude(factor)
    return YarnScaling(
        factor=factor,
        original_positions=original,
        attention_factor=rope.take("attention_factor", float, amplitude),
        fast=rope.take("beta_fast", float, 32.0),
        slow=rope.take("beta_slow", float, 1.0),
        truncate=rope.take("truncate", bool, True),
    )


def _long_rope(fields: Fields, rope: Fields) -> RopeScaling | None:
    """Factors for long sequences where the model is to take such, else those for short ones: a cache holds keys that
    were rotated by one set of factors. To serve short sequences only, lower `max_position_embeddings`."""
    longest, original = _positions(fields, rope)
    factors = {kind: tuple(rope.take_list(f"{kind}_factor", float)) for kind in ("short", "long")}
    factor = rope.take("factor", float, longest / original)
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if min(factor, original) > 1 else 1.0
    amplitude = rope.take("attention_factor", float, amplitude)
    amplitudes = {kind: rope.take(f"{kind}_mscale", float, amplitude) for kind in factors}
    kind = "long" if longest > original else "short"
    return LongRopeScaling(factors[kind], amplitudes[kind])


def _llama3(fields: Fields, rope: Fields) -> RopeScaling | None:
    _, original = _positions(fields, rope)
    low, high = (rope.take(f"{name}_freq_factor", float) for name in ("low", "high"))
    return Llama3Scaling(rope.take("factor", float), low, high, original)


def _positions(fields: Fields, rope: Fields) -> tuple[int, int]:
    """The longest sequence that the model takes, and that of before it was stretched."""
    longest, name = fields.take("max_position_embeddings", int), "original_max_position_embeddings"
    return longest, fields.take(name, int, rope.take(name, int, longest))


SCALINGS: Mapping[str, Callable[[Fields, Fields], RopeScaling | None]] = {
    "default": lambda fields, rope: None,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "deepseek_yarn": _yarn,
    "longrope": _long_rope,
    "llama3": _llama3,
}
