from __future__ import annotations

import jax
import pytest

from moe_jax.errors import PlacementError
from moe_jax.sharding import make_mesh


def test_omitted_axes_have_size_one() -> None:
    assert dict(make_mesh("data=2,expert=4").shape) == {"data": 2, "expert": 4, "tensor": 1}
    assert dict(make_mesh({"tensor": 3}).shape) == {"data": 1, "expert": 1, "tensor": 3}


def test_all_devices_are_on_expert_by_default() -> None:
    assert dict(make_mesh().shape) == {"data": 1, "expert": 8, "tensor": 1}


def test_a_smaller_mesh_uses_the_first_devices() -> None:
    assert make_mesh(" expert = 2 , tensor=3").devices.size == 6
    assert make_mesh("expert=2", jax.devices()[4:]).devices.flatten().tolist() == jax.devices()[4:6]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("data=2,model=4", "cannot read 'model=4'"),
        ("data", "cannot read 'data'"),
        ("data=two", "cannot read 'data=two'"),
        ("data=2,data=2", "at most once"),
        ("", "cannot read ''"),
        ("expert=0", "must have a size of at least 1"),
        ("data=3,expert=4", "data=3,expert=4,tensor=1 needs 12 devices, there are 8"),
        ({"pipeline": 2}, "unknown mesh axes"),
    ],
)
def test_invalid_meshes_are_refused(sizes: str | dict[str, int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        make_mesh(sizes)
