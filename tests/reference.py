"""Feed-forward blocks in plain NumPy, token by token, in float64: what every placement must agree with."""

from __future__ import annotations

import numpy as np

from moe_jax.config import MoEConfig

Weights = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def swiglu(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return (silu(x @ gate_up[:, 0]) * (x @ gate_up[:, 1])) @ down


def moe(x: np.ndarray, weights: Weights, config: MoEConfig) -> np.ndarray:
    out = np.zeros_like(x)
    for row, token in enumerate(x):
        scores = np.exp(token @ weights["router.weight"])
        scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[: config.top_k]
        total = scores[best].sum() if config.renormalise else 1.0
        for expert in best:
            y = swiglu(token, weights["experts.gate_up"][expert], weights["experts.down"][expert])
            out[row] += scores[expert] / total * y
        if config.shared is not None:
            shared = swiglu(token, weights["shared.swiglu.gate_up"], weights["shared.swiglu.down"])
            gate = 1 / (1 + np.exp(-token @ weights["shared.gate"])) if config.shared.gated else 1.0
            out[row] += gate * shared
    return out


def dense(x: np.ndarray, weights: Weights) -> np.ndarray:
    return np.stack([swiglu(token, weights["swiglu.gate_up"], weights["swiglu.down"]) for token in x])
