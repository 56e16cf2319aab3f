"""Families that transformers does not have, in plain NumPy: one sequence at a time, no cache, every sum written out.

Written from descriptions of the models, for `goldens/make_plain_goldens.py` and the test that it says the same still.
A config is what `config.json` holds, weights are tensors by their names in the file; numbers are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Config = Mapping[str, Any]
Weights = Mapping[str, np.ndarray]


def logits(config: Config, weights: Weights, tokens: Sequence[int]) -> np.ndarray:
    """`[tokens, vocab]`."""
    model = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    latent, apart = config["model_type"] == "sarvam_mla", config["model_type"] == "sdar_moe"
    x = model["model.embed_tokens.weight" if latent or apart else "model.word_embeddings.weight"][list(tokens)]
    eps = config["rms_norm_eps"]
    for number in range(config["num_hidden_layers"]):
        start = f"model.layers.{number}."
        layer = {name.removeprefix(start): tensor for name, tensor in model.items() if name.startswith(start)}
        layer = fused(layer) if apart else layer
        attend = latent_attention if latent else attention
        x = x + attend(config, layer, unit(x, eps) * layer["input_layernorm.weight"])
        y = unit(x, eps) * layer["post_attention_layernorm.weight"]
        is_dense = number < config.get("first_k_dense_replace", 1 if "sarvam" in config["model_type"] else 0)
        x = x + (mlp(layer, "mlp.", y) if is_dense else np.stack([mixture(config, layer, row) for row in y]))
    head = model["lm_head.weight"]
    if config.get("norm_head"):
        head = head / np.sqrt((head**2).sum(axis=0))
    return unit(x, eps) * model["model.norm.weight"] @ head.T


def fused(layer: Weights) -> Weights:
    """Attention whose tensors are apart, by the names of Ling."""
    parts = [layer[f"self_attn.{part}_proj.weight"] for part in "qkv"]
    return {
        **layer,
        "attention.query_key_value.weight": np.concatenate(parts),
        "attention.query_layernorm.weight": layer["self_attn.q_norm.weight"],
        "attention.key_layernorm.weight": layer["self_attn.k_norm.weight"],
        "attention.dense.weight": layer["self_attn.o_proj.weight"],
    }


def attention(config: Config, layer: Weights, x: np.ndarray) -> np.ndarray:
    heads, shared, width = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    fused = (x @ layer["attention.query_key_value.weight"].T).reshape(len(x), heads + 2 * shared, width)
    query, key, value = fused[:, :heads], fused[:, heads : heads + shared], fused[:, heads + shared :]
    if config.get("use_qk_norm", config["model_type"] in ("sarvam_moe", "sdar_moe")):
        query = unit(query, config["rms_norm_eps"]) * layer["attention.query_layernorm.weight"]
        key = unit(key, config["rms_norm_eps"]) * layer["attention.key_layernorm.weight"]
    turned = int(width * config.get("partial_rotary_factor", 1.0))
    frequencies = config["rope_theta"] ** -(np.arange(0, turned, 2) / turned)
    query, key = (
        np.concatenate([rotated_halves(part[..., :turned], frequencies), part[..., turned:]], axis=-1)
        for part in (query, key)
    )
    block = config.get("block_size", 1)
    out = [
        causal(query[:, head] @ key[:, head * shared // heads].T / math.sqrt(width), block)
        @ value[:, head * shared // heads]
        for head in range(heads)
    ]
    return np.concatenate(out, axis=1) @ layer["attention.dense.weight"].T


def latent_attention(config: Config, layer: Weights, x: np.ndarray) -> np.ndarray:
    heads, rank, value_width = (config[name] for name in ("num_attention_heads", "kv_lora_rank", "v_head_dim"))
    plain, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    frequencies, magnitude = yarn(config["rope_scaling"], config["rope_theta"], turned)
    down = x @ layer["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = unit(down[:, :rank], 1e-6) * layer["self_attn.kv_a_layernorm.weight"]
    shared_key = rotated_neighbours(down[:, rank:], frequencies)
    made = (latent @ layer["self_attn.kv_b_proj.weight"].T).reshape(len(x), heads, plain + value_width)
    query = (x @ layer["self_attn.q_proj.weight"].T).reshape(len(x), heads, plain + turned)
    out = []
    for head in range(heads):
        scores = query[:, head, :plain] @ made[:, head, :plain].T
        scores += rotated_neighbours(query[:, head, plain:], frequencies) @ shared_key.T
        out.append(causal(scores * magnitude**2 / math.sqrt(plain + turned)) @ made[:, head, plain:])
    return np.concatenate(out, axis=1) @ layer["self_attn.o_proj.weight"].T


def yarn(scaling: Config, theta: float, width: int) -> tuple[np.ndarray, float]:
    """Frequencies, and what queries and keys are each multiplied by, which is 1 where both magnitudes are alike."""
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    assert scaling["mscale"] == scaling["mscale_all_dim"], "else rotated parts would be scaled by themselves"

    def index(turns: float) -> float:
        """Of the frequency with so many turns within the original positions."""
        return width / 2 * math.log(original / (turns * 2 * math.pi), theta)

    low = max(math.floor(index(scaling["beta_fast"])), 0)
    high = min(math.ceil(index(scaling["beta_slow"])), width - 1)
    out = []
    for i in range(width // 2):
        kept = theta ** (-2 * i / width)
        slowed = min(max((i - low) / max(high - low, 0.001), 0), 1)
        out.append(kept * (1 - slowed) + kept / factor * slowed)
    return np.array(out), 0.1 * scaling["mscale_all_dim"] * math.log(factor) + 1


def mixture(config: Config, layer: Weights, x: np.ndarray) -> np.ndarray:
    """Of one row."""
    kind = config["model_type"]
    biased = config.get("moe_router_enable_expert_bias", "sarvam" in kind)
    scores = layer["mlp.gate.weight"] @ x
    scores = 1 / (1 + np.exp(-scores)) if biased else np.exp(scores) / np.exp(scores).sum()
    judged = scores
    if biased:
        judged = scores + layer["mlp.gate.e_score_correction_bias" if kind == "sarvam_mla" else "mlp.gate.expert_bias"]
    count = config["num_experts"]
    groups, kept = config.get("n_group", 1), config.get("topk_group", 1)
    if kind == "sarvam_mla" and "n_group" not in config:
        groups, kept = count // 8, 2
    by_group = judged.reshape(groups, -1)
    best = np.sort(by_group)[:, -2:].sum(axis=1) if biased else by_group.max(axis=1)
    allowed = [expert for expert in range(count) if expert * groups // count in np.argsort(-best)[:kept]]
    chosen = sorted(allowed, key=lambda expert: -judged[expert])[: config["num_experts_per_tok"]]
    total = sum(scores[expert] for expert in chosen) if config.get("norm_topk_prob", True) else 1.0
    scale = config.get("routed_scaling_factor", 2.5 if "sarvam" in kind else 1.0)
    out = mlp(layer, "mlp.shared_experts.", x) if config.get("num_shared_experts") else np.zeros_like(x)
    for expert in chosen:
        out = out + mlp(layer, f"mlp.experts.{expert}.", x) * scores[expert] / total * scale
    return out


def mlp(layer: Weights, start: str, x: np.ndarray) -> np.ndarray:
    gate, up = x @ layer[start + "gate_proj.weight"].T, x @ layer[start + "up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ layer[start + "down_proj.weight"].T


def unit(x: np.ndarray, eps: float) -> np.ndarray:
    """Of mean square 1."""
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def causal(scores: np.ndarray, block: int = 1) -> np.ndarray:
    """Softmax of each row's scores up to its own, or the end of its block."""
    number = np.arange(len(scores)) // block
    weights = np.exp(scores - scores.max(axis=1, keepdims=True)) * (number[:, None] >= number)
    return weights / weights.sum(axis=1, keepdims=True)


def rotated_halves(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """`[tokens, heads, width]`: number i turns with number i + width / 2."""
    step_input = np.exp(1j * np.arange(len(x))[:, None, None] * frequencies)
    turned = (x[..., : len(frequencies)] + 1j * x[..., len(frequencies) :]) * step_input
    return np.concatenate([turned.real, turned.imag], axis=-1)


def rotated_neighbours(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """`[tokens, width]`: number 2i turns with number 2i + 1."""
    turned = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * np.arange(len(x))[:, None] * frequencies)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
