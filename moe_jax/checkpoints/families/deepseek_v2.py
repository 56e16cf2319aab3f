"""DeepSeek-V2 (arXiv:2405.04434): multi-head latent attention, softmax router, group-limited in the larger models."""

from moe_jax.checkpoints.families import latent_attention
from moe_jax.checkpoints.families.deepseek_layers import dense_layers, group_limit, moe_config
from moe_jax.checkpoints.families.llama_fields import model
from moe_jax.checkpoints.families.shared_names import DENSE_MLP, MODEL, MOE, SHARED
from moe_jax.checkpoints.fields import Fields
from moe_jax.config import DenseConfig, GroupScore, LayerConfig, ModelConfig, RouterConfig

SOURCES = {**MODEL, **latent_attention.SOURCES, **DENSE_MLP, **MOE, **SHARED}


def read(fields: Fields) -> ModelConfig:
    fields.expect_all({"scoring_func": "softmax", "moe_layer_freq": 1, "mlp_bias": False, "norm_topk_prob": False})
    limited = fields.get("topk_method", "greedy") == "group_limited_greedy"
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    limit = group_limit(fields, GroupScore.BEST, 1, 1)
    router = RouterConfig(limit=limit if limited else None, scale=fields.take("routed_scaling_factor", float, 1.0))
    moe = moe_config(fields, router, experts="n_routed_experts", shared="n_shared_experts")
    dense = DenseConfig(fields.take("intermediate_size", int))
    attn = latent_attention.latent_attention(fields, interleaved=True)
    layers = [LayerConfig(attn, dense if is_dense else moe) for is_dense in dense_layers(fields, dense=0)]
    return model(fields, layers, eps=1e-6)
