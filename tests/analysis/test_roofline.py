"""Roofline of a step against figures computed by hand from its sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from decoders import ATTENTION, MODEL, MOE
from placements import placement

from moe_jax.analysis.roofline import roofline
from moe_jax.config import DenseConfig, LayerConfig, MoEConfig, RouterConfig
from moe_jax.models import ShardedDecoder
from moe_jax.sharding import as_hardware

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 16, 8, 2, 4, 16
VOCABULARY = 128
"""Rows of the head: a vocabulary of 64, padded."""
ATTENDED = 2 * HIDDEN * HEADS * HEAD_DIM + 2 * HIDDEN * KV_HEADS * HEAD_DIM + 2 * HIDDEN
"""Weights of a layer's four attention projections and two norms."""
DENSE = 3 * HIDDEN * WIDTH
TWO_OF_EIGHT = HIDDEN * 8 + DENSE * 8 * 2 // 8 + DENSE + HIDDEN
"""Weights of the router, of a quarter of the experts, and of the shared expert with its gate."""
ONE_OF_FOUR, THREE_OF_FOUR = (HIDDEN * 4 + 3 * HIDDEN * 8 * top_k for top_k in (1, 3))

LAYERS = (
    LayerConfig(ATTENTION, DenseConfig(WIDTH)),
    LayerConfig(ATTENTION, MoEConfig(4, 3, 8, RouterConfig(norm=1))),
    *2 * (LayerConfig(ATTENTION, MOE), LayerConfig(ATTENTION, MoEConfig(4, 1, 8, RouterConfig(norm=1)))),
)
VISITED = 6 * ATTENDED + DENSE + THREE_OF_FOUR + 2 * (TWO_OF_EIGHT + ONE_OF_FOUR) + HIDDEN * (VOCABULARY + 1)
"""Weights that a token is multiplied with: those of the layers, the final norm and the head."""


@pytest.mark.parametrize("placement_name", ["single", "two_replicas_dp4_ep4"])
@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_token_visits_top_k_experts(placement_name: str, scan_layers: bool, tied: bool) -> None:
    config = replace(MODEL, layers=LAYERS, tied_embeddings=tied)
    decoder = ShardedDecoder(config, placement(placement_name), "float32", scan_layers)
    hardware, devices = as_hardware("h100"), placement(placement_name).mesh.devices.size
    estimate = roofline(decoder, hardware, rows=24, slots=3, positions=20, collective_seconds=1.0)
    assert estimate.compute_seconds == pytest.approx(2 * 24 * VISITED / devices / hardware.flops)
    page_of_16 = 16 * 2 * KV_HEADS * HEAD_DIM * 4
    assert estimate.cache_bytes == len(LAYERS) * 3 * 2 * page_of_16
    assert estimate.memory_seconds == pytest.approx(
        (estimate.weight_bytes + estimate.cache_bytes) / hardware.memory_bandwidth
    )
    assert estimate.step_seconds == 1.0 + max(estimate.memory_seconds, estimate.compute_seconds)
    shared = roofline(decoder, replace(hardware, shared=True), rows=24, slots=3, positions=20, collective_seconds=0)
    assert shared.compute_seconds == pytest.approx(devices * estimate.compute_seconds)
    assert shared.memory_seconds == pytest.approx(devices * estimate.memory_seconds)
