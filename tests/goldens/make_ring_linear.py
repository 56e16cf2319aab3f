"""Make the golden checkpoints of bailing_moe_linear, which transformers lacks, with a plain NumPy model.

    python -m tests.goldens.make_ring_linear

The folders have the form of those of `make_goldens.py`. The model is written for reading, in double precision: one
sequence at a time, one position and one head at a time, without a cache, and independent of the package.
"""

from __future__ import annotations

from itertools import count
from math import exp, log2
from typing import Any

import numpy as np

from tests.goldens.make_plain_goldens import GAIN, PROMPT_LENGTHS, STEPS, reference, write

MIN_TOKEN_GAP, MIN_CHOICE_GAP = 1e-3, 1e-3
"""Smallest gaps: best to second-best logit, relative to the largest; last chosen to first rejected expert or group."""

# fmt: off
COMMON = {
    "architectures": ["BailingMoeLinearV2ForCausalLM"], "model_type": "bailing_moe_linear", "attention_dropout": 0.0,
    "embedding_dropout": 0.0, "output_dropout": 0.0, "hidden_act": "silu", "linear_silu": False,
    "max_position_embeddings": 64, "moe_router_enable_expert_bias": True, "num_nextn_predict_layers": 0,
    "rope_scaling": None, "router_dtype": "fp32", "score_function": "sigmoid", "torch_dtype": "float32",
    "use_bias": False, "use_cache": True, "use_qkv_bias": False, "use_rmsnorm": True,
}
CASES: dict[str, dict[str, Any]] = {
    "bailing_moe_linear_e8_top2": {  # lightning, softmax; dense, sparse
        "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 4, "layer_group_size": 2, "group_norm_size": 4, "use_qk_norm": True,
        "partial_rotary_factor": 0.5, "rope_theta": 100.0, "rms_norm_eps": 0.01,
        "first_k_dense_replace": 1, "intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8, "num_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
    },
    "bailing_moe_linear_e4_top1_six_heads": {  # lightning, lightning, softmax
        "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 4, "layer_group_size": 3, "group_norm_size": 2, "use_qk_norm": False,
        "partial_rotary_factor": 1.0, "rope_theta": 1e4, "rms_norm_eps": 0.01,
        "first_k_dense_replace": 0, "intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 1,
        "moe_intermediate_size": 8, "num_shared_experts": 2,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.5,
        "tie_word_embeddings": True,
    },
}
# fmt: on


class Model:
    """A Ring-linear model: its tensors by name, and its computation."""

    def __init__(self, config: dict[str, Any], seed: int) -> None:
        self.config = config
        self.random = np.random.default_rng(seed)
        self.tensors: dict[str, np.ndarray] = {}
        self.least_gap = float("inf")
        """Smallest gap of all choices of experts so far."""
        hidden, width, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
        self._draw("model.word_embeddings.weight", config["vocab_size"], hidden)
        if not config["tie_word_embeddings"]:
            self._draw("lm_head.weight", config["vocab_size"], hidden)
        self._draw("model.norm.weight", hidden)
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            kv_heads = heads if self.is_linear(layer) else config["num_key_value_heads"]
            self._draw(at + "input_layernorm.weight", hidden)
            self._draw(at + "post_attention_layernorm.weight", hidden)
            self._draw(at + "attention.query_key_value.weight", (heads + 2 * kv_heads) * width, hidden)
            self._draw(at + "attention.dense.weight", hidden, heads * width)
            if config["use_qk_norm"]:
                self._draw(at + "attention.query_layernorm.weight", width)
                self._draw(at + "attention.key_layernorm.weight", width)
            if self.is_linear(layer):
                self._draw(at + "attention.g_proj.weight", heads * width, hidden)
                self._draw(at + "attention.g_norm.weight", heads * width)
            self._draw_feed_forward(at + "mlp.", layer)

    def is_linear(self, layer: int) -> bool:
        return (layer + 1) % self.config["layer_group_size"] != 0

    def is_dense(self, layer: int) -> bool:
        return layer < self.config["first_k_dense_replace"]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits after each token, `[tokens, vocab]`."""
        x = self._get("model.word_embeddings.weight")[tokens]
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + self._mix(at + "attention.", layer, self._norm(x, at + "input_layernorm.weight"))
            x = x + self._feed_forward(at + "mlp.", layer, self._norm(x, at + "post_attention_layernorm.weight"))
        head = "model.word_embeddings" if self.config["tie_word_embeddings"] else "lm_head"
        return self._norm(x, "model.norm.weight") @ self._get(head + ".weight").T

    def _mix(self, at: str, layer: int, x: np.ndarray) -> np.ndarray:
        config, width = self.config, self.config["head_dim"]
        heads = config["num_attention_heads"]
        kv_heads = heads if self.is_linear(layer) else config["num_key_value_heads"]
        fused = (x @ self._get(at + "query_key_value.weight").T).reshape(len(x), -1, width)
        query, key, value = fused[:, :heads], fused[:, heads : heads + kv_heads], fused[:, heads + kv_heads :]
        if config["use_qk_norm"]:
            query = self._norm(query, at + "query_layernorm.weight")
            key = self._norm(key, at + "key_layernorm.weight")
        query, key = self._rotate(query), self._rotate(key)
        mixed = self._lightning if self.is_linear(layer) else self._softmax
        out = mixed(query * width**-0.5, key, value, layer)
        if self.is_linear(layer):
            groups = out.reshape(len(x), config["group_norm_size"], -1)
            out = self._unit(groups).reshape(len(x), -1) * self._get(at + "g_norm.weight")
            out = out / (1 + np.exp(-x @ self._get(at + "g_proj.weight").T))
        return out.reshape(len(x), -1) @ self._get(at + "dense.weight").T

    def _lightning(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, layer: int) -> np.ndarray:
        out, gaps = np.zeros_like(value), self.config["num_hidden_layers"] - 1
        for head, rate in enumerate(rates(query.shape[1])):
            kept = exp(-rate * (1 - (layer - 1) / gaps + 1e-5))
            state = np.zeros((key.shape[2], value.shape[2]))
            for at in range(len(query)):
                state = kept * state + np.outer(key[at, head], value[at, head])
                out[at, head] = query[at, head] @ state
        return out

    def _softmax(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, layer: int) -> np.ndarray:
        out, each = np.zeros_like(query), query.shape[1] // key.shape[1]
        for at, head in np.ndindex(query.shape[:2]):
            scores = key[: at + 1, head // each] @ query[at, head]
            weights = np.exp(scores - scores.max())
            out[at, head] = weights @ value[: at + 1, head // each] / weights.sum()
        return out

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        turned = int(x.shape[2] * self.config["partial_rotary_factor"])
        pairs = turned // 2
        out = x.copy()
        for at, pair in np.ndindex(len(x), pairs):
            angle = at * self.config["rope_theta"] ** (-2 * pair / turned)
            cos, sin = np.cos(angle), np.sin(angle)
            first, second = x[at, :, pair], x[at, :, pair + pairs]
            out[at, :, pair], out[at, :, pair + pairs] = first * cos - second * sin, second * cos + first * sin
        return out

    def _feed_forward(self, at: str, layer: int, x: np.ndarray) -> np.ndarray:
        if self.is_dense(layer):
            return self._swiglu(at, x)
        out = self._swiglu(at + "shared_experts.", x)
        for row, vector in enumerate(x):
            for expert, weight in self._choose(at, vector):
                out[row] += weight * self._swiglu(f"{at}experts.{expert}.", vector)
        return out

    def _choose(self, at: str, x: np.ndarray) -> list[tuple[int, float]]:
        """Return the experts of a row, with their weights."""
        config = self.config
        scores = 1 / (1 + np.exp(-self._get(at + "gate.weight") @ x))
        biased = (scores + self._get(at + "gate.expert_bias")).reshape(config["n_group"], -1)
        judged = np.sort(biased, axis=1)[:, -2:].sum(axis=1)
        for group in self._best(judged, config["topk_group"], leave=True):
            biased[group] = -np.inf
        kept = self._best(biased.reshape(-1), config["num_experts_per_tok"])
        total = sum(scores[expert] for expert in kept) if config["norm_topk_prob"] else 1
        return [(expert, config["routed_scaling_factor"] * scores[expert] / total) for expert in kept]

    def _best(self, scores: np.ndarray, kept: int, *, leave: bool = False) -> list[int]:
        order = np.argsort(-scores).tolist()
        if kept < len(order):
            self.least_gap = min(self.least_gap, float(scores[order[kept - 1]] - scores[order[kept]]))
        return order[kept:] if leave else order[:kept]

    def _swiglu(self, at: str, x: np.ndarray) -> np.ndarray:
        gate, up = (x @ self._get(f"{at}{part}_proj.weight").T for part in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self._get(at + "down_proj.weight").T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self._unit(x) * self._get(name)

    def _unit(self, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])

    def _get(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float64)

    def _draw_feed_forward(self, at: str, layer: int) -> None:
        config, hidden = self.config, self.config["hidden_size"]
        if self.is_dense(layer):
            self._draw_swiglu(at, config["intermediate_size"])
            return
        self._draw(at + "gate.weight", config["num_experts"], hidden)
        self.tensors[at + "gate.expert_bias"] = 0.1 * self.random.normal(size=config["num_experts"]).astype(np.float32)
        self._draw_swiglu(at + "shared_experts.", config["moe_intermediate_size"] * config["num_shared_experts"])
        for expert in range(config["num_experts"]):
            self._draw_swiglu(f"{at}experts.{expert}.", config["moe_intermediate_size"])

    def _draw_swiglu(self, at: str, width: int) -> None:
        for part in ("gate", "up"):
            self._draw(f"{at}{part}_proj.weight", width, self.config["hidden_size"])
        self._draw(at + "down_proj.weight", self.config["hidden_size"], width)

    def _draw(self, name: str, *shape: int) -> None:
        noise = self.random.normal(size=shape)
        drawn = 1 + 0.3 * noise if len(shape) == 1 else GAIN * noise / shape[-1] ** 0.5
        self.tensors[name] = drawn.astype(np.float32)


def rates(heads: int) -> list[float]:
    """Return the decay rate of each head, before it is scaled for the layer."""
    if log2(heads).is_integer():
        return [2 ** (-8 * (head + 1) / heads) for head in range(heads)]
    below = 2 ** int(log2(heads))
    return rates(below) + rates(2 * below)[::2][: heads - below]


def fault(model: Model, found: dict[str, np.ndarray]) -> str | None:
    logits = found["token_logits"]
    second, first = np.moveaxis(np.sort(logits)[..., -2:], -1, 0)
    if ((first - second) / np.abs(logits).max(-1)).min() <= MIN_TOKEN_GAP:
        return "two next tokens nearly tie"
    if model.least_gap <= MIN_CHOICE_GAP:
        return "two experts nearly tie"
    if min(len(set(row)) for row in found["tokens"].tolist()) < STEPS // 2:
        return "a continuation hardly varies"
    return None


def main() -> None:
    for name, settings in CASES.items():
        for seed in count():
            model = Model(COMMON | settings, seed)
            random = np.random.default_rng(seed)
            prompts = [random.integers(settings["vocab_size"], size=length).tolist() for length in PROMPT_LENGTHS]
            found = reference(settings["vocab_size"], model.logits, prompts)
            if (why := fault(model, found)) is None:
                break
            print(f"{name}: not seed {seed}, {why}")
        write(name, model.config, model.tensors, found, seed)
        print(f"{name}: seed {seed}")


if __name__ == "__main__":
    main()
