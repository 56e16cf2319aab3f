"""Everything that owns a parameter, as Flax NNX modules written for one device of a placement.

They run inside `shard_map`, see their own shard of every parameter and row, and talk to other devices only through the
`Combine` of a `Step`.
"""

from moe_jax.layers.attention import Attention
from moe_jax.layers.delta_attention import DeltaAttention
from moe_jax.layers.embedding import Vocabulary
from moe_jax.layers.latent_attention import LatentAttention
from moe_jax.layers.lightning_attention import LightningAttention
from moe_jax.layers.mamba import Mamba
from moe_jax.layers.mlp import DenseMLP
from moe_jax.layers.moe import MoE
from moe_jax.layers.norm import LayerNorm, RMSNorm, row_norm
from moe_jax.layers.router import Load

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
    "row_norm",
]
