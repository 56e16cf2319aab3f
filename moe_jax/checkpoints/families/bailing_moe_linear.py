"""Ring-linear: lightning attention (arXiv:2401.04658), softmax attention on every few layers, DeepSeek-V3 router.

The checkpoint has no tensor for the decay rates of the heads. The rates fall from layer to layer as in the model code
published with the weights; some engines shift them by one layer.
"""

from moe_jax.checkpoints.families import ling_layers
from moe_jax.checkpoints.families.gated_delta import recurrent_layers
from moe_jax.checkpoints.families.ling_layers import ATTENTION
from moe_jax.checkpoints.families.llama_fields import attention, model
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import linear, plain
from moe_jax.config import LayerConfig, LightningConfig, ModelConfig, QKNorm

SOURCES = {
    **ling_layers.SOURCES,
    **ling_layers.qkv_sources("attention"),
    **ling_layers.qkv_sources("recurrence"),
    "recurrence.gate.weight": linear(ATTENTION + "g_proj.weight"),
    "recurrence.norm.weight": plain(ATTENTION + "g_norm.weight"),
}


def read(fields: Fields) -> ModelConfig:
    hidden, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    fields.expect("head_dim", hidden // heads)
    fields.expect_all({"linear_silu": False, "use_linear_silu": False, "linear_rope": True})
    has_norm = fields.take("use_qk_norm", bool, False)
    full = attention(fields, theta=6e5, qk_norm=QKNorm.HEAD if has_norm else None)
    for name in ("score_function", "moe_router_enable_expert_bias"):
        if not fields.has(name):
            fields.problem(f"{name} is missing: without it, engines choose experts differently")
    ffns = ling_layers.hybrid_feed_forwards(fields, scale=1.0, dense=0, n_group=1, topk_group=1)
    if len(ffns) % fields.take("layer_group_size", int, 1):
        fields.problem("layer_group_size must divide num_hidden_layers: engines differ on the layers left over")
    gaps = max(len(ffns) - 1, 1)
    lightning = LightningConfig(
        heads,
        full.head_dim,
        full.rope,
        has_norm,
        fields.take("group_norm_size", int),
        scale=1 + 1 / gaps + 1e-5,
        scale_decrement=1 / gaps,
    )
    mixers = [lightning if recurrent else full for recurrent in recurrent_layers(fields, "layer_group_size", 1)]
    return model(fields, map(LayerConfig, mixers, ffns), eps=1e-6)
