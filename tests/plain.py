"""NumPy reference of model families that transformers does not have: one sequence at a time, float64, no cache.

Written from descriptions of the models. `goldens/make_plain_goldens.py` writes goldens with it, and a test compares it
with these. A config is the content of `config.json`; weights are tensors by their names in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Config = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]


def logits(config: Config, weights: Weights, tokens: Sequence[int]) -> np.ndarray:
    """Logits `[tokens, vocab]` of all positions."""
    model = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    is_mla, is_sdar = config["model_type"] == "sarvam_mla", config["model_type"] == "sdar_moe"
    x = model["model.embed_tokens.weight" if is_mla or is_sdar else "model.word_embeddings.weight"][list(tokens)]
    eps = config["rms_norm_eps"]
    for index in range(config["num_hidden_layers"]):
        start = f"model.layers.{index}."
        layer = {name.removeprefix(start): tensor for name, tensor in model.items() if name.startswith(start)}
        layer = fuse_qkv(layer) if is_sdar else layer
        attend = mla if is_mla else attention
        x = x + attend(config, layer, rms_norm(x, eps) * layer["input_layernorm.weight"])
        y = rms_norm(x, eps) * layer["post_attention_layernorm.weight"]
        is_dense = index < config.get("first_k_dense_replace", 1 if "sarvam" in config["model_type"] else 0)
        x = x + (mlp(layer, "mlp.", y) if is_dense else np.stack([moe(config, layer, row) for row in y]))
    head = model["lm_head.weight"]
    if config.get("norm_head"):
        head = head / np.sqrt((head**2).sum(axis=0))
    return rms_norm(x, eps) * model["model.norm.weight"] @ head.T


def fuse_qkv(layer: Weights) -> Weights:
    """Fuse separate query, key and value projections, and use the tensor names of Ling."""
    parts = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
    return {
        **layer,
        "attention.query_key_value.weight": np.concatenate(parts),
        "attention.query_layernorm.weight": layer["self_attn.q_norm.weight"],
        "attention.key_layernorm.weight": layer["self_attn.k_norm.weight"],
        "attention.dense.weight": layer["self_attn.o_proj.weight"],
    }


def attention(config: Config, layer: Weights, x: np.ndarray) -> np.ndarray:
    heads, kv_heads, head_dim = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    qkv = (x @ layer["attention.query_key_value.weight"].T).reshape(len(x), heads + 2 * kv_heads, head_dim)
    query, key, value = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
    if config.get("use_qk_norm", config["model_type"] in ("sarvam_moe", "sdar_moe")):
        query = rms_norm(query, config["rms_norm_eps"]) * layer["attention.query_layernorm.weight"]
        key = rms_norm(key, config["rms_norm_eps"]) * layer["attention.key_layernorm.weight"]
    rotary_dim = int(head_dim * config.get("partial_rotary_factor", 1.0))
    frequencies = config["rope_theta"] ** -(np.arange(0, rotary_dim, 2) / rotary_dim)
    query, key = (
        np.concatenate([rotate_halves(part[..., :rotary_dim], frequencies), part[..., rotary_dim:]], axis=-1)
        for part in (query, key)
    )
    block = config.get("block_size", 1)
    out = [
        causal(query[:, head] @ key[:, head * kv_heads // heads].T / math.sqrt(head_dim), block)
        @ value[:, head * kv_heads // heads]
        for head in range(heads)
    ]
    return np.concatenate(out, axis=1) @ layer["attention.dense.weight"].T


def mla(config: Config, layer: Weights, x: np.ndarray) -> np.ndarray:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""
    heads, kv_lora_rank, v_head_dim = (config[name] for name in ("num_attention_heads", "kv_lora_rank", "v_head_dim"))
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    frequencies, magnitude = yarn(config["rope_scaling"], config["rope_theta"], rope)
    down = x @ layer["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(down[:, :kv_lora_rank], 1e-6) * layer["self_attn.kv_a_layernorm.weight"]
    shared_key = rotate_pairs(down[:, kv_lora_rank:], frequencies)
    key_values = (latent @ layer["self_attn.kv_b_proj.weight"].T).reshape(len(x), heads, nope + v_head_dim)
    query = (x @ layer["self_attn.q_proj.weight"].T).reshape(len(x), heads, nope + rope)
    out = []
    for head in range(heads):
        scores = query[:, head, :nope] @ key_values[:, head, :nope].T
        scores += rotate_pairs(query[:, head, nope:], frequencies) @ shared_key.T
        out.append(causal(scores * magnitude**2 / math.sqrt(nope + rope)) @ key_values[:, head, nope:])
    return np.concatenate(out, axis=1) @ layer["self_attn.o_proj.weight"].T


def yarn(scaling: Config, theta: float, width: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv:2309.00071): frequencies, and the factor of the magnitudes of queries and keys."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    assert scaling["mscale"] == scaling["mscale_all_dim"], "different magnitudes would scale the rotary part alone"

    def index(turns: float) -> float:
        """Index of the frequency with `turns` rotations within the original positions."""
        return width / 2 * math.log(original / (turns * 2 * math.pi), theta)

    low = max(math.floor(index(scaling["beta_fast"])), 0)
    high = min(math.ceil(index(scaling["beta_slow"])), width - 1)
    out = []
    for i in range(width // 2):
        extrapolated = theta ** (-2 * i / width)
        ramp = min(max((i - low) / max(high - low, 0.001), 0), 1)
        out.append(extrapolated * (1 - ramp) + extrapolated / factor * ramp)
    return np.array(out), 0.1 * scaling["mscale_all_dim"] * math.log(factor) + 1


def moe(config: Config, layer: Weights, x: np.ndarray) -> np.ndarray:
    """Mixture of experts for one row."""
    kind = config["model_type"]
    has_bias = config.get("moe_router_enable_expert_bias", "sarvam" in kind)
    scores = layer["mlp.gate.weight"] @ x
    scores = 1 / (1 + np.exp(-scores)) if has_bias else np.exp(scores) / np.exp(scores).sum()
    selection = scores
    if has_bias:
        bias = "e_score_correction_bias" if kind == "sarvam_mla" else "expert_bias"
        selection = scores + layer[f"mlp.gate.{bias}"]
    count = config["num_experts"]
    groups, kept_groups = config.get("n_group", 1), config.get("topk_group", 1)
    if kind == "sarvam_mla" and "n_group" not in config:
        groups, kept_groups = count // 8, 2
    by_group = selection.reshape(groups, -1)
    best = np.sort(by_group)[:, -2:].sum(axis=1) if has_bias else by_group.max(axis=1)
    allowed = [expert for expert in range(count) if expert * groups // count in np.argsort(-best)[:kept_groups]]
    chosen = sorted(allowed, key=lambda expert: -selection[expert])[: config["num_experts_per_tok"]]
    total = sum(scores[expert] for expert in chosen) if config.get("norm_topk_prob", True) else 1.0
    scale = config.get("routed_scaling_factor", 2.5 if "sarvam" in kind else 1.0)
    out = mlp(layer, "mlp.shared_experts.", x) if config.get("num_shared_experts") else np.zeros_like(x)
    for expert in chosen:
        out = out + mlp(layer, f"mlp.experts.{expert}.", x) * scores[expert] / total * scale
    return out


def mlp(layer: Weights, start: str, x: np.ndarray) -> np.ndarray:
    gate, up = x @ layer[start + "gate_proj.weight"].T, x @ layer[start + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ layer[start + "down_proj.weight"].T


def rms_norm(x: np.ndarray, eps: float) -> np.ndarray:
    """Scale rows to mean square 1."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def causal(scores: np.ndarray, block: int = 1) -> np.ndarray:
    """Attention weights `[tokens, tokens]` that are causal between blocks and bidirectional within a block."""
    blocks = np.arange(len(scores)) // block
    weights = np.exp(scores - scores.max(axis=1, keepdims=True)) * (blocks[:, None] >= blocks)
    return weights / weights.sum(axis=1, keepdims=True)


def rotate_halves(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotary embedding of `[tokens, heads, width]` that pairs column i with column i + width / 2."""
    rotation = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    rotated = (x[..., : len(frequencies)] + 1j * x[..., len(frequencies) :]) * rotation
    return np.concatenate([rotated.real, rotated.imag], axis=-1)


def rotate_pairs(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Rotary embedding of `[tokens, width]` that pairs column 2i with column 2i + 1."""
    rotated = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)
