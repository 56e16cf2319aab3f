"""Placements shared by tests: those of the README's table, a single device, and six devices."""

from itertools import product
from math import prod

from moe_jax.sharding import Placement, make_mesh
from moe_jax.sharding.mesh import AXES

ROLES = ("tokens", "heads", "experts", "ffn")

PLACEMENTS = {
    "single": "data=1",
    "dp8_ep8": "expert=8",
    "dp4_ep4_tp2": "expert=4,tensor=2",
    "dp2_ep4": "data=2,expert=2,tensor=2; tokens=data; heads=expert,tensor; experts=data,expert; ffn=tensor",
    "dp8_ep4_moe_tp2": ("data=2,expert=2,tensor=2; tokens=data,expert,tensor; heads=; experts=data,expert; ffn=tensor"),
    "two_replicas_dp4_ep4": "data=2,expert=4",
    "tp8_ep4": "expert=4,tensor=2; tokens=data; heads=expert,tensor; experts=expert; ffn=tensor",
    "dp2_moe_tp8": "data=2,expert=2,tensor=2; tokens=data; heads=expert,tensor; experts=; ffn=data,expert,tensor",
    "ffn_not_split": "data=2,expert=2,tensor=2; tokens=data,expert; heads=tensor; experts=expert; ffn=",
    "dp6_ep6": "expert=6",
}


def placement(name: str) -> Placement:
    return Placement.parse(PLACEMENTS[name])


def all_placements(devices: int) -> list[Placement]:
    """Return every placement on a number of devices: all axis sizes, and all roles of the axes larger than 1.

    Placements that differ only in the names of axes are returned once, with some order of names.
    """
    by_roles: dict[tuple, Placement] = {}
    for sizes in product(range(1, devices + 1), repeat=len(AXES)):
        if prod(sizes) != devices:
            continue
        split = [axis for axis, size in zip(AXES, sizes, strict=True) if size > 1]
        for roles in product(product(("tokens", "heads"), ("experts", "ffn", None)), repeat=len(split)):
            roles_of = dict(zip(split, roles, strict=True))
            key = tuple(sorted((sizes[AXES.index(axis)], str(roles)) for axis, roles in roles_of.items()))
            axes = {role: tuple(axis for axis in split if role in roles_of[axis]) for role in ROLES}
            # The last of equal placements is kept, so that the order of names varies.
            by_roles[key] = Placement(make_mesh(dict(zip(AXES, sizes, strict=True))), **axes)
    return list(by_roles.values())
