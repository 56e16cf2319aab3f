"""The two orders of latent attention's products."""

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

LINES, CHUNK, POSITIONS, HEADS, RANK, ROTATED = 2, 3, 7, 4, 6, 4
CONFIG = LatentAttentionConfig(HEADS, 8, RANK, 5, ROTATED, 3, RopeConfig(100.0), scale=0.4)


def attention(config: LatentAttentionConfig) -> LatentAttention:
    return LatentAttention(config, 16, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_both_orders_give_the_same() -> None:
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)  # noqa: E731
    query = draw(0, LINES, CHUNK, HEADS, 5 + ROTATED)
    latents, rotated = draw(1, 1, LINES, POSITIONS, RANK), draw(2, 1, LINES, POSITIONS, ROTATED)
    seen = jnp.arange(POSITIONS) <= jnp.array([[0, 3, 6], [2, 2, 5]])[..., None]
    made = attention(CONFIG)
    cached, look = StepKV(KVBlock(rotated, latents, jnp.tile(jnp.arange(POSITIONS), (LINES, 1)))), lambda _: seen
    one, other = jax.jit(lambda: (made.expanded(query, cached, look), made.absorbed(query, cached, look)))()
    assert one.shape == (LINES, CHUNK, HEADS, 3)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(jnp.abs(one).max()))


def test_few_queries_go_to_the_latents_and_many_have_them_expanded() -> None:
    made = attention(LatentAttentionConfig(HEADS, None, 512, 128, 64, 128, RopeConfig(1e4), scale=0.1))
    assert [made.absorbs(chunk) for chunk in (1, 64, 170, 171, 512)] == [True, True, True, False, False]


def test_expanded_at_every_step_a_model_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatentAttention, "absorbs", lambda *_: False)
    assert_parity("deepseek_v3_e8_top2_groups_yarn", "data=2,expert=2,tensor=2", "auto", "auto", others=3)
