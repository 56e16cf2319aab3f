"""Rotary embedding with every scaling, against transformers (see goldens/make_rope.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.rope_fields import read_rope
from moe_jax.config import NTKScaling, RopeConfig
from moe_jax.kernels.rope import Rotary

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "rope.json").read_text())
HEAD_DIM, LONGEST = GOLDEN["head_dim"], GOLDEN["max_position_embeddings"]


def rotary(fields: dict[str, Any]) -> Rotary:
    raw = {"max_position_embeddings": LONGEST, **fields}
    configs: list[RopeConfig] = []

    def read(fields: Fields) -> RopeConfig:
        fields.ignore("max_position_embeddings")
        configs.append(read_rope(fields, HEAD_DIM, theta=500.0))
        return configs[0]

    return Rotary(Fields(raw).read(read), HEAD_DIM)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["rope_parameters"]["rope_type"])
def test_frequencies_and_amplitudes_equal_those_of_transformers(case: dict[str, Any]) -> None:
    current = rotary({"rope_parameters": case["rope_parameters"]})
    np.testing.assert_allclose(current.frequencies, case["frequencies"], rtol=1e-6)
    assert current.amplitude == pytest.approx(case["amplitude"])
    rope = dict(case["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    assert rotary({"rope_theta": theta, "rope_scaling": {"type": kind, **rope}}).config == current.config


def test_ntk_scaling_divides_the_lowest_frequency_by_alpha() -> None:
    plain, scaled = (Rotary(RopeConfig(1e4, scaling=scaling), 16).frequencies for scaling in (None, NTKScaling(8.0)))
    np.testing.assert_allclose(scaled[[0, -1]], plain[[0, -1]] / [1, 8], rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_numbers_of_a_head_are_rotated_as_complex_numbers(interleaved: bool) -> None:
    partial_rotary = Rotary(RopeConfig(100.0, width=8, interleaved=interleaved), head_dim=12)
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, 2, 12)))
    positions = np.array([0, 5, 11])
    first, second = (x[..., 0:8:2], x[..., 1:8:2]) if interleaved else (x[..., :4], x[..., 4:8])
    expected = (first + 1j * second) * np.exp(1j * positions[:, None, None] * 100.0 ** (-np.arange(4) / 4))
    got = np.asarray(partial_rotary(jnp.asarray(x), partial_rotary.at(jnp.asarray(positions))))
    pairs = (got[..., 0:8:2], got[..., 1:8:2]) if interleaved else (got[..., :4], got[..., 4:8])
    np.testing.assert_allclose(pairs[0] + 1j * pairs[1], expected, atol=1e-5)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
