"""Meshes of users: any axis types and names; and placements that fit a model."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from moe_jax import LLM, SamplingParams
from moe_jax.checkpoints import Checkpoint
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import PlacementError
from moe_jax.sharding import Placement, as_placement, check_divisibility, placement_for
from moe_jax.sharding.divisibility import fitting_mesh

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = GOLDENS / "qwen3_moe_gqa4_e8_top2"
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def with_experts(experts: int) -> ModelConfig:
    """Return the config of a model of width 32 with a number of experts."""
    config = Checkpoint(GOLDEN).config
    layers = []
    for layer in config.layers:
        assert isinstance(layer.ffn, MoEConfig)
        layers.append(replace(layer, ffn=replace(layer.ffn, experts=experts)))
    return replace(config, layers=tuple(layers))


@pytest.mark.parametrize(
    ("experts", "mesh"),
    [(8, "expert=8"), (16, "expert=8"), (4, "data=2,expert=4"), (6, "data=4,expert=2"), (5, "data=8")],
)
def test_the_default_mesh_divides_the_model(experts: int, mesh: str, caplog: pytest.LogCaptureFixture) -> None:
    config = with_experts(experts)
    with caplog.at_level(logging.INFO, "moe_jax"):
        placement = placement_for(config, None)
    check_divisibility(config, placement)
    assert placement == as_placement(mesh)
    assert bool(caplog.records) == (mesh != "expert=8"), "the log says so if it is not the usual mesh"


@pytest.mark.parametrize(
    "path", sorted(path.parent for path in GOLDENS.glob("*/config.json")), ids=lambda path: path.name
)
def test_errors_name_a_mesh_that_works(path: Path) -> None:
    config = Checkpoint(path).config
    for devices in (3, 5, 7):
        mesh = Placement.parse(f"tensor={devices}")
        with pytest.raises(PlacementError, match="do not divide over") as caught:
            check_divisibility(config, mesh)
        (named,) = re.findall("such as mesh '(.*)'", str(caught.value))
        assert as_placement(named).mesh.size == devices
        check_divisibility(config, as_placement(named))
    assert as_placement(fitting_mesh(config, 1)).mesh.size == 1


def order(mesh: Mesh) -> list[int]:
    return [device.id for device in mesh.devices.flat]


def test_meshes_of_jax_serve() -> None:
    """Axes of type Explicit, in another order, and with fewer axes."""
    explicit = jax.make_mesh((2, 2), ("expert", "data"), axis_types=(AxisType.Explicit,) * 2)
    placement = as_placement(explicit)
    assert placement.mesh.shape == {"data": 2, "expert": 2, "tensor": 1}
    assert order(placement.mesh) == np.array(order(explicit)).reshape(2, 2).T.flatten().tolist()
    with (
        LLM(GOLDEN, mesh="data=2,expert=2", dtype="float32") as ours,
        LLM(GOLDEN, mesh=explicit, dtype="float32") as llm,
    ):
        prompts = [[1, 2, 3], [4, 5]]
        outputs, expected = llm.generate(prompts, GREEDY), ours.generate(prompts, GREEDY)
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_axes_of_other_names_are_mapped() -> None:
    mesh = jax.make_mesh((2, 2, 2, 1), ("tp", "x", "y", "pp"))
    placement = Placement.from_mesh(mesh, {"expert": ("y", "x"), "tensor": "tp"})
    assert placement.mesh.shape == {"data": 1, "expert": 4, "tensor": 2}
    devices = np.array(order(mesh)).reshape(2, 2, 2)
    assert order(placement.mesh) == devices.transpose(2, 1, 0).flatten().tolist()


@pytest.mark.parametrize(
    "axes",
    [None, {"data": "a"}, {"data": "a", "expert": "c"}, {"data": "a", "expert": "a"}, {"data": "a", "experts": "b"}],
)
def test_wrong_mappings_are_refused_in_words(axes: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    with pytest.raises(
        PlacementError, match=r"cannot use the axes \{'a': 2, 'b': 4\} as .* each once, as in Placement"
    ):
        Placement.from_mesh(mesh, axes)


def test_a_placement_itself_needs_the_axes_of_make_mesh() -> None:
    with pytest.raises(PlacementError, match=r"all of type Auto, got .*Placement\.from_mesh"):
        Placement(jax.make_mesh((2, 4), ("a", "b")))
