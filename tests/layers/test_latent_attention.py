"""Both orders of latent attention's products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_goldens import assert_parity

from moe_jax.config import LatentAttentionConfig, RopeConfig
from moe_jax.kernels.kv_cache import KVBlock, StepKV
from moe_jax.layers import LatentAttention

SEGMENTS, CHUNK, POSITIONS, HEADS, RANK, ROTATED = 2, 3, 7, 4, 6, 4
CONFIG = LatentAttentionConfig(HEADS, 8, RANK, 5, ROTATED, 3, RopeConfig(100.0), scale=0.4)


def attention(config: LatentAttentionConfig) -> LatentAttention:
    return LatentAttention(config, 16, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_both_orders_give_the_same_output() -> None:
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    query = draw(0, SEGMENTS, CHUNK, HEADS, 5 + ROTATED)
    latents, rotated = draw(1, 1, SEGMENTS, POSITIONS, RANK), draw(2, 1, SEGMENTS, POSITIONS, ROTATED)
    visible = jnp.arange(POSITIONS) <= jnp.array([[0, 3, 6], [2, 2, 5]])[..., None]
    layer = attention(CONFIG)
    cached, mask = StepKV(KVBlock(rotated, latents, jnp.tile(jnp.arange(POSITIONS), (SEGMENTS, 1)))), lambda _: visible
    expanded, absorbed = jax.jit(lambda: (layer.expanded(query, cached, mask), layer.absorbed(query, cached, mask)))()
    assert expanded.shape == (SEGMENTS, CHUNK, HEADS, 3)
    np.testing.assert_allclose(expanded, absorbed, rtol=0, atol=1e-5 * float(jnp.abs(expanded).max()))


def test_few_queries_are_absorbed_and_many_expand_the_latents() -> None:
    layer = attention(LatentAttentionConfig(HEADS, None, 512, 128, 64, 128, RopeConfig(1e4), scale=0.1))
    assert [layer.absorbs(chunk) for chunk in (1, 64, 170, 171, 512)] == [True, True, True, False, False]


def test_a_model_gives_the_same_logits_if_every_step_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: False)
    assert_parity("deepseek_v3_e8_top2_groups_yarn", "data=2,expert=2,tensor=2", "auto", "auto", others=3)
