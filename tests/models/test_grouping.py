from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import AttentionConfig, DenseConfig, LayerConfig, RopeConfig
from moe_jax.models import group_layers

KINDS = [LayerConfig(AttentionConfig(2, 2, 4, RopeConfig(1e4)), DenseConfig(width)) for width in (8, 16, 24)]


def groups(layers: str) -> list[tuple[str, int]]:
    kinds = dict(zip("abc", KINDS, strict=True))
    names = {kind: name for name, kind in kinds.items()}
    found = group_layers([kinds[letter] for letter in layers])
    return [("".join(names[layer] for layer in group.unit), group.repeats) for group in found]


def test_one_unit_is_traced_however_deep_the_model() -> None:
    assert groups("a" * 48) == [("a", 48)]
    assert groups("a" + "b" * 47) == [("a", 1), ("b", 47)]
    assert groups("ab" * 24) == [("ab", 24)]
    assert groups("aaab" * 12) == [("aaab", 12)]
    assert groups("abc") == [("a", 1), ("b", 1), ("c", 1)]
    assert groups("c" + "ab" * 5 + "a") == [("c", 1), ("ab", 5), ("a", 1)]


@given(st.text("abc", min_size=1, max_size=30))
def test_groups_give_every_layer_once_in_order(layers: str) -> None:
    assert "".join(unit * repeats for unit, repeats in groups(layers)) == layers
    kinds = dict(zip("abc", KINDS, strict=True))
    found = group_layers([kinds[letter] for letter in layers])
    numbers = [g.layer(repeat, i) for g in found for repeat in range(g.repeats) for i in range(len(g.unit))]
    assert numbers == list(range(len(layers)))
