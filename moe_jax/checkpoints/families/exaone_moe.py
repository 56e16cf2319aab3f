"""K-EXAONE: sliding windows with rotary embedding, full attention without it at intervals, DeepSeek-V3 router."""

from dataclasses import replace

from moe_jax.checkpoints.families.deepseek_layers import feed_forwards
from moe_jax.checkpoints.families.llama_fields import attention, layer_windows, model
from moe_jax.checkpoints.families.shared_names import ATTENTION_BLOCK, DENSE_MLP, MLP, MODEL, MOE, SHARED
from moe_jax.checkpoints.fields import Fields
from moe_jax.checkpoints.weight_mapping import plain
from moe_jax.config import LayerConfig, ModelConfig, MoEConfig, QKNorm

BIAS = {"ffn.router.selection_bias": plain(MLP + "e_score_correction_bias")}
SOURCES = {**MODEL, **ATTENTION_BLOCK, **DENSE_MLP, **MOE, **SHARED, **BIAS}


def read(fields: Fields) -> ModelConfig:
    fields.rename("first_last_k_dense_replace", "first_k_dense_replace")
    fields.expect_all({"scoring_func": "sigmoid", "topk_method": "noaux_tc"})
    ffns = feed_forwards(fields, experts="num_experts", shared="num_shared_experts", scale=2.5, dense=1)
    fields.expect("is_moe_layer", [isinstance(ffn, MoEConfig) for ffn in ffns])
    sliding = attention(fields, theta=1e4, qk_norm=QKNorm.HEAD)
    full = replace(sliding, rope=None) if fields.has("sliding_window") else sliding
    windows = layer_windows(fields, len(ffns), pattern=_pattern(fields, len(ffns)))
    mixers = [full if window is None else replace(sliding, window=window) for window in windows]
    return model(fields, map(LayerConfig, mixers, ffns), eps=1e-5)


def _pattern(fields: Fields, layers: int) -> list[str]:
    """Read `sliding_window_pattern` as the type of each layer.

    A number n means that every n-th layer has full attention; letters repeat, L for sliding and G for full attention.
    """
    pattern = fields.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        kinds = [pattern[layer % len(pattern)] for layer in range(layers - 1)] + ["G"]
    elif type(pattern) is int and pattern > 0:
        kinds = ["G" if (layer + 1) % pattern == 0 else "L" for layer in range(layers)]
    else:
        fields.problem(
            f"sliding_window_pattern must be a number of layers or a string of letters L and G, got {pattern!r}"
        )
        kinds = ["G"] * layers
    return [{"L": "sliding_attention", "G": "full_attention"}[kind] for kind in kinds]
