"""A Mixtral-like checkpoint with layers that are large enough for memory measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, EXPERTS, WIDTH, VOCAB = 3, 256, 16, 1024, 128


def write(path: Path) -> int:
    """Write the checkpoint to a new directory; return the size of one layer's weights, in bytes."""
    path.mkdir()
    config = {
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    (path / "config.json").write_text(json.dumps(config))
    outer = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    layers = [shape for layer in range(LAYERS) for shape in _layer(layer).items()]
    save_file(
        {name: np.full(shape, 0.01, np.float32) for name, shape in [*outer.items(), *layers]},
        path / "model.safetensors",
    )
    return sum(4 * int(np.prod(shape)) for shape in _layer(0).values())


def _layer(layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "input_layernorm.weight": (HIDDEN,),
        prefix + "post_attention_layernorm.weight": (HIDDEN,),
        prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        prefix + "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        prefix + "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        prefix + "block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        names = prefix + f"block_sparse_moe.experts.{expert}."
        shapes |= {
            names + "w1.weight": (WIDTH, HIDDEN),
            names + "w3.weight": (WIDTH, HIDDEN),
            names + "w2.weight": (HIDDEN, WIDTH),
        }
    return shapes
