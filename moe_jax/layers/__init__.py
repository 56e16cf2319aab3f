"""Flax NNX modules for every part of a model that owns parameters, written for one device of a placement.

They run inside `jax.shard_map`, see their own shard of every parameter and row, and communicate through the `Combine`
and `ResidualLayout` that they are given. In a model of your own, `on_mesh` runs a feed-forward layer on whole arrays.
"""
# ruff: noqa: I001  (in groups, by subject)

# In a model of your own
from moe_jax.layers.sharded import on_mesh  # a feed-forward layer as a function of whole arrays
from moe_jax.layers.sharded import specs  # partition specs of a module's variables on a placement

# Feed-forward layers
from moe_jax.layers.moe import MoE  # routed experts and, in some models, a shared one
from moe_jax.layers.mlp import DenseMLP  # a gated feed-forward without experts
from moe_jax.layers.router import Load  # assignments and scores of each expert, for the balancing loss

# Attention
from moe_jax.layers.attention import Attention  # grouped-query attention over a cache
from moe_jax.layers.latent_attention import LatentAttention  # DeepSeek's multi-head latent attention

# Recurrent layers
from moe_jax.layers.delta_attention import DeltaAttention  # gated delta rule
from moe_jax.layers.lightning_attention import LightningAttention  # linear attention with a decay for each head
from moe_jax.layers.mamba import Mamba  # selective state space

# Vocabulary and norms
from moe_jax.layers.embedding import Vocabulary  # token embedding and LM head
from moe_jax.layers.norm import LayerNorm  # zero mean, unit variance
from moe_jax.layers.norm import RMSNorm  # unit mean square
from moe_jax.layers.norm import row_norm  # the norm that a model config asks for

__all__ = [
    "Attention",
    "DeltaAttention",
    "DenseMLP",
    "LatentAttention",
    "LayerNorm",
    "LightningAttention",
    "Load",
    "Mamba",
    "MoE",
    "RMSNorm",
    "Vocabulary",
    "on_mesh",
    "row_norm",
    "specs",
]
