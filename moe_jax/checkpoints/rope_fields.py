"""Reader of the rotary embedding in `config.json`.

Older files have the fields `rope_theta`, `partial_rotary_factor` and `rope_scaling`; newer files have one object,
`rope_parameters`.
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

ROPE_SCALING, ROPE_PARAMETERS = "rope_scaling", "rope_parameters"


def read_rope(
    fields: Fields, head_dim: int, *, theta: float, fraction: float = 1.0, interleaved: bool = False
) -> RopeConfig:
    """Read the rotary embedding of heads of width `head_dim`.

    Args:
      theta: default of `rope_theta`.
      fraction: default of `partial_rotary_factor`, the part of each head that is rotated.
      interleaved: rotate neighbouring channels instead of halves.
    """
    theta = fields.take("rope_theta", float, theta)
    fraction = fields.take("partial_rotary_factor", float, fraction)
    return read_rope_object(fields, rope_object(fields), head_dim, theta, fraction, interleaved)


def read_layer_type_rope(fields: Fields, layer_type: str, head_dim: int, *, fraction: float = 1.0) -> RopeConfig:
    """Read the rotary embedding of one type of layers from `rope_parameters`, which has an object for each type."""
    rope = fields.inner(ROPE_PARAMETERS).inner(layer_type)
    return read_rope_object(fields, rope, head_dim, rope.take("rope_theta", float), fraction)


def read_rope_object(
    fields: Fields, rope: Fields, head_dim: int, theta: float, fraction: float, interleaved: bool = False
) -> RopeConfig:
    """Read the rotary embedding from `rope`, an object within `fields`; `theta` and `fraction` are defaults."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.ignore("type")
    theta = rope.take("rope_theta", float, theta)
    fraction = rope.take("partial_rotary_factor", float, fraction)
    width = int(head_dim * fraction)
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        fields.problem(f"rotary embedding of type {kind!r} is not supported (only {', '.join(ROPE_TYPES)})")
        return RopeConfig(theta)
    return RopeConfig(theta, None if width == head_dim else width, interleaved, ROPE_TYPES[kind](fields, rope))


def rope_object(fields: Fields) -> Fields:
    """Return the object that describes the scaling: `rope_scaling` or `rope_parameters`."""
    if fields.has(ROPE_SCALING) and fields.has(ROPE_PARAMETERS):
        fields.problem(f"{ROPE_SCALING} and {ROPE_PARAMETERS} are two descriptions of one thing: remove one")
    old, new = fields.inner(ROPE_SCALING), fields.inner(ROPE_PARAMETERS)
    return old if fields.has(ROPE_SCALING) else new


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's attention factor, `0.1 * mscale * ln(factor) + 1` (arXiv:2309.00071).

    The factor compensates for a softmax over more positions.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1


def _linear(fields: Fields, rope: Fields) -> RopeScaling | None:
    return LinearScaling(rope.take("factor", float))


def _dynamic(fields: Fields, rope: Fields) -> RopeScaling | None:
    """Read NTK scaling with a fixed `alpha`.

    Without `alpha`, scaling would begin beyond `max_position_embeddings`, which no sequence exceeds.
    """
    rope.ignore("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    alpha = rope.take_optional("alpha", float)
    return None if alpha is None else NTKScaling(alpha)


def _yarn(fields: Fields, rope: Fields) -> RopeScaling | None:
    longest, original = _positions(fields, rope)
    factor = rope.take("factor", float, longest / original)
    mscale, mscale_all_dim = (rope.take_optional(name, float) for name in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        amplitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        amplitude = yarn_mscale(factor)
    return YarnScaling(
        factor=factor,
        original_positions=original,
        attention_factor=rope.take("attention_factor", float, amplitude),
        fast=rope.take("beta_fast", float, 32.0),
        slow=rope.take("beta_slow", float, 1.0),
        truncate=rope.take("truncate", bool, True),
    )


def _long_rope(fields: Fields, rope: Fields) -> RopeScaling | None:
    """Read LongRoPE: the long factors if `max_position_embeddings` exceeds the original length, else the short ones.

    The cache holds keys rotated by one set of factors. To serve short sequences only, lower `max_position_embeddings`.
    """
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
    """Read the longest sequence of the model, in positions, after and before the scaling."""
    longest, name = fields.take("max_position_embeddings", int), "original_max_position_embeddings"
    return longest, fields.take(name, int, rope.take(name, int, longest))


ROPE_TYPES: Mapping[str, Callable[[Fields, Fields], RopeScaling | None]] = {
    "default": lambda fields, rope: None,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "deepseek_yarn": _yarn,
    "longrope": _long_rope,
    "llama3": _llama3,
}
