"""Hunyuan 3: DeepSeek-V3 router without groups, scaled router weights, a dense first layer."""

from moe_jax.checkpoints.families.deepseek_layers import dense_layers, moe_config
from moe_jax.checkpoints.families.llama_fields import attention, model
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MLP, MODEL, MOE
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import linear, plain
from moe_jax.config import DenseConfig, LayerConfig, ModelConfig, QKNorm, RouterConfig, Score

SHARED = MLP + "shared_mlp."
SOURCES = {
    **MODEL,
    **ATTENTION_BLOCK,
    **DENSE_MLP,
    **MOE,
    "ffn.router.weight": linear(MLP + "router.gate.weight"),
    "ffn.router.selection_bias": plain(MLP + "expert_bias"),
    "ffn.shared.swiglu.gate_up": linear(SHARED + "gate_proj.weight", SHARED + "up_proj.weight"),
    "ffn.shared.swiglu.down": linear(SHARED + "down_proj.weight"),
}


def read(fields: Fields) -> ModelConfig:
    fields.expect_all(
        {
            "mlp_bias": False,
            "moe_router_enable_expert_bias": True,
            "moe_router_use_sigmoid": True,
            "qk_norm": True,
            "route_norm": True,
        }
    )
    fields.expect("expert_hidden_dim", fields.get("moe_intermediate_size", None))
    fields.ignore("enable_attention_fp32_softmax", "enable_lm_head_fp32")  # both are in float32 here
    fields.ignore("enable_moe_fp32_combine")  # routed and shared experts are always added in the dtype of the rows
    bias = fields.take("attention_bias", bool, False)
    attn = attention(fields, theta=11158840.0, qk_norm=QKNorm.HEAD, bias=bias, output_bias=bias)
    scale = fields.take("router_scaling_factor", float, 2.826)
    router = RouterConfig(Score.SIGMOID, selection_bias=True, norm=1, scale=scale)
    moe = moe_config(fields, router, experts="num_experts", shared="num_shared_experts")
    dense = DenseConfig(fields.take("intermediate_size", int))
    layers = [LayerConfig(attn, dense if is_dense else moe) for is_dense in dense_layers(fields, dense=1)]
    return model(fields, layers, eps=1e-5)
