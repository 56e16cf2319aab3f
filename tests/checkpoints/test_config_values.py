"""Any value in any field of a config.json is read, or refused in words."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.checkpoints import Checkpoint
from moe_jax.checkpoints.fields import LAYERS
from moe_jax.config import ModelConfig, NTKScaling, RopeConfig
from moe_jax.config.rope import check_rotated
from moe_jax.errors import ConfigError, MoEJaxError
from moe_jax.kernels.rope import Rotary
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import as_placement

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(path.parent for path in GOLDENS.glob("*/config.json"))
NEST: Any = []
for _ in range(200):
    NEST = [NEST]
VALUES: list[Any] = [
    0, 1, 2, 3, -1, 10**30, 0.0, 0.5, 1.0, -2.5, 1e308, 1e-320, math.nan, math.inf, -math.inf, "", "text", "default",
    True, False, None, [], {}, [0], [1, 2], ["text"], [None], {"a": 1}, {"type": "yarn"}, {"rope_type": "linear"}, NEST,
]  # fmt: skip


def places(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each field, of each inner object, and of the first item of each list."""
    if path:
        yield path
    if isinstance(config, dict):
        for name, value in config.items():
            yield from places(value, (*path, name))
    elif isinstance(config, list) and config:
        yield from places(config[0], (*path, 0))


def replaced(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a config with another value at a path."""
    changed = copy.deepcopy(config)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return changed


def read(raw: Any, directory: Path) -> ModelConfig | None:
    """Read a config; return `None` if it is refused in words."""
    (directory / "config.json").write_text(json.dumps(raw))
    with suppress(MoEJaxError):
        return Checkpoint(directory).config
    return None


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_any_value_of_a_field_is_read_or_refused_in_words(number: int, tmp_path: Path) -> None:
    """A quarter of the fields of each config; a family has several, which begin at other fields."""
    raw, accepted = json.loads((CASES[number] / "config.json").read_text()), 0
    for path in list(places(raw))[number % 4 :: 4]:
        for value in VALUES:
            try:
                config = read(replaced(raw, path, value), tmp_path)
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}: {error!r}") from error
            if config is not None:
                accepted += 1
                check_frequencies(config)
    assert accepted


def check_frequencies(config: ModelConfig) -> None:
    for layer in {layer.attention: None for layer in config.layers}:
        rope = getattr(layer, "rope", None)
        if rope is not None:
            frequencies = Rotary(rope, rope.width or getattr(layer, "head_dim", 0)).frequencies
            assert np.isfinite(frequencies).all(), rope


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case.name)
def test_shapes_of_any_config_that_is_read(case: Path, tmp_path: Path) -> None:
    raw, placement = json.loads((case / "config.json").read_text()), as_placement("data=1")
    configs = [read(replaced(raw, path, value), tmp_path) for path in places(raw) for value in (2, 3, 10**9)]
    for config in dict.fromkeys(config for config in configs if config is not None and len(config.layers) < 8):
        with suppress(MoEJaxError):
            assert jax.tree.leaves(ShardedDecoder(config, placement, "float32").parameters)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 4, "rope_theta": 1.0, "original_max_position_embeddings": 16}, "above 1"),
        ({"rope_type": "yarn", "factor": 4, "rope_theta": 0.5, "original_max_position_embeddings": 16}, "above 1"),
        ({"rope_type": "linear", "factor": 1e-300, "rope_theta": 1e4}, "factor must be from 1e-37 to 1e"),
        ({"rope_type": "linear", "factor": 10**400, "rope_theta": 1e4}, "factor must be"),
    ],
)
def test_ropes_without_a_meaning_are_refused(rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    raw = json.loads((GOLDENS / "qwen3_moe_gqa4_e8_top2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_parameters": rope}))
    with pytest.raises(ConfigError, match=message):
        Checkpoint(tmp_path)


def test_ntk_needs_two_frequencies() -> None:
    with pytest.raises(ConfigError, match="the rotated width must be above 2"):
        check_rotated(RopeConfig(1e4, scaling=NTKScaling(8.0)), 2)
    check_rotated(RopeConfig(1e4, scaling=NTKScaling(8.0)), 4)


def test_numbers_of_layers_are_bounded(tmp_path: Path) -> None:
    """A list of layers is made of them."""
    for case in CASES:
        raw = json.loads((case / "config.json").read_text())
        for path in places(raw):
            if path[-1] in LAYERS and path[0] != "vision_config":
                (tmp_path / "config.json").write_text(json.dumps(replaced(raw, path, 10**30)))
                with pytest.raises(ConfigError, match=f"{path[-1]} must be at most 10,000"):
                    pytest.fail(f"{case.name} {Checkpoint(tmp_path)}")
