"""Grouping of repeating layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, RopeConfig
from moe_jax.models import Group, group_layers

LAYERS = [LayerConfig(AttentionConfig(2, 2, 4, RopeConfig(1e4)), DenseConfig(width)) for width in (8, 16, 24)]


def grouped(letters: str) -> list[Group]:
    """Group layers, each given as a letter."""
    return list(group_layers([LAYERS["abc".index(letter)] for letter in letters]))


def groups(letters: str) -> list[tuple[str, int]]:
    """Letters and repeats of each group."""
    return [("".join("abc"[LAYERS.index(layer)] for layer in group.unit), group.repeats) for group in grouped(letters)]


def test_repeating_layers_become_one_unit() -> None:
    assert groups("a" * 48) == [("a", 48)]
    assert groups("a" + "b" * 47) == [("a", 1), ("b", 47)]
    assert groups("ab" * 24) == [("ab", 24)]
    assert groups("aaab" * 12) == [("aaab", 12)]
    assert groups("abc") == [("a", 1), ("b", 1), ("c", 1)]
    assert groups("c" + "ab" * 5 + "a") == [("c", 1), ("ab", 5), ("a", 1)]


@given(st.text("abc", min_size=1, max_size=30))
def test_groups_contain_every_layer_once_in_order(letters: str) -> None:
    assert "".join(unit * repeats for unit, repeats in groups(letters)) == letters
    indices = [
        group.layer_index(repeat, index)
        for group in grouped(letters)
        for repeat in range(group.repeats)
        for index in range(len(group.unit))
    ]
    assert indices == list(range(len(letters)))
