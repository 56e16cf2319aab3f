"""Placements that the tests share: those of the README's table, a single device, and six devices."""

from moe_jax.sharding import Placement

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
