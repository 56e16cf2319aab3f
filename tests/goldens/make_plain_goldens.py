"""Make the golden checkpoints of families that transformers lacks, with the logits of `tests/plain.py`.

    python -m tests.goldens.make_plain_goldens              # every case
    python -m tests.goldens.make_plain_goldens CASE ...     # only these cases

The folders have the form of those of `make_goldens.py`. A seed is accepted only if rounding differences can change
neither a token nor the choice of an expert: the best logits are well apart, and a nudge of the embeddings makes no
logits jump.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.plain import logits
from tests.plain_blocks import decode

HERE = Path(__file__).parent
PROMPT_LENGTHS = (5, 1, 12, 3, 9, 2)
STEPS = 8
GAIN = 1.5
NUDGE, MAX_CHANGE = 1e-4, 2e-2
SMALL = {
    "vocab_size": 48, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_act": "silu",
    "intermediate_size": 16, "moe_intermediate_size": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
TINY = {"vocab_size": 32, "hidden_size": 16, "head_dim": 4, "moe_intermediate_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "bailing_moe_gqa4_e8_top3": {  # sparse, sparse
        **SMALL, "model_type": "bailing_moe", "num_key_value_heads": 2, "head_dim": 8, "norm_head": True,
        "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 2, "norm_topk_prob": False,
        "rope_theta": 100.0, "use_bias": False, "use_qkv_bias": False,
    },
    "bailing_moe_v2_gqa2_e8_top2_groups": {  # dense, sparse
        **SMALL, "model_type": "bailing_moe_v2", "num_key_value_heads": 4, "head_dim": 8, "partial_rotary_factor": 0.5,
        "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "norm_topk_prob": True,
        "moe_shared_expert_intermediate_size": 16, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "use_qk_norm": True,
        "first_k_dense_replace": 1, "rope_theta": 100.0,
    },
    "sarvam_moe_gqa8_e8_top2": {  # dense, sparse
        **SMALL, "model_type": "sarvam_moe", "num_key_value_heads": 1, "head_dim": 8, "num_experts": 8,
        "num_experts_per_tok": 2, "num_shared_experts": 1, "rope_theta": 100.0,
    },
    "sarvam_mla_e24_top2": {  # dense, sparse
        **SMALL, "model_type": "sarvam_mla", "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 6, "head_dim": 20, "q_head_dim": 16, "num_experts": 24, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "rope_theta": 100.0,
        "rope_scaling": {
            "type": "deepseek_yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
        },
    },
    "llada2_moe_gqa4_e8_top2_groups": {  # dense, sparse
        **SMALL, **TINY, "model_type": "llada2_moe", "num_key_value_heads": 2, "partial_rotary_factor": 0.5,
        "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 2, "norm_topk_prob": True, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 2.5, "moe_router_enable_expert_bias": True, "use_qk_norm": True,
        "score_function": "sigmoid", "first_k_dense_replace": 1, "rope_theta": 100.0, "block_size": 8,
        "mask_token_id": 31,
    },
    "sdar_moe_gqa2_e8_top3": {  # sparse, sparse
        **SMALL, **TINY, "model_type": "sdar_moe", "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "rope_theta": 100.0, "block_size": 4, "mask_token_id": 7,
    },
}  # fmt: skip
SCHEDULES = {"llada2_moe_gqa4_e8_top2_groups": (0.6, 8), "sdar_moe_gqa2_e8_top3": (0.6, 4)}
"""Confidence threshold and denoising steps of each case."""


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor."""
    hidden, latent, apart = (
        config["hidden_size"],
        *(config["model_type"] == kind for kind in ("sarvam_mla", "sdar_moe")),
    )
    yield f"model.{'embed_tokens' if latent or apart else 'word_embeddings'}.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        yield layer + "input_layernorm.weight", (hidden,)
        yield layer + "post_attention_layernorm.weight", (hidden,)
        attend = latent_shapes if latent else apart_shapes if apart else attention_shapes
        for name, shape in attend(config):
            yield layer + name, shape
        dense = number < config.get("first_k_dense_replace", 1 if "sarvam" in config["model_type"] else 0)
        for name, shape in mlp_shapes("mlp.", config["intermediate_size"], hidden) if dense else moe_shapes(config):
            yield layer + name, shape


def attention_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    yield "attention.query_key_value.weight", ((heads + 2 * config["num_key_value_heads"]) * width, hidden)
    yield "attention.dense.weight", (hidden, heads * width)
    if config.get("use_qk_norm", config["model_type"] == "sarvam_moe"):
        yield "attention.query_layernorm.weight", (width,)
        yield "attention.key_layernorm.weight", (width,)


def apart_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    shared = config["num_key_value_heads"]
    for part, number in (("q", heads), ("k", shared), ("v", shared)):
        yield f"self_attn.{part}_proj.weight", (number * width, hidden)
    yield "self_attn.o_proj.weight", (hidden, heads * width)
    yield "self_attn.q_norm.weight", (width,)
    yield "self_attn.k_norm.weight", (width,)


def latent_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, turned, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    yield "self_attn.q_proj.weight", (heads * (plain + turned), hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + turned, hidden)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (plain + value), rank)
    yield "self_attn.o_proj.weight", (hidden, heads * value)


def moe_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    experts, hidden, width = (config[name] for name in ("num_experts", "hidden_size", "moe_intermediate_size"))
    yield "mlp.gate.weight", (experts, hidden)
    if config.get("moe_router_enable_expert_bias", "sarvam" in config["model_type"]):
        name = "e_score_correction_bias" if config["model_type"] == "sarvam_mla" else "expert_bias"
        yield f"mlp.gate.{name}", (experts,)
    for expert in range(experts):
        yield from mlp_shapes(f"mlp.experts.{expert}.", width, hidden)
    shared = config.get("moe_shared_expert_intermediate_size", width) * config.get("num_shared_experts", 0)
    if shared:
        yield from mlp_shapes("mlp.shared_experts.", shared, hidden)


def mlp_shapes(start: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield start + "gate_proj.weight", (width, hidden)
    yield start + "up_proj.weight", (width, hidden)
    yield start + "down_proj.weight", (hidden, width)


def drawn(config: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return random weights, norms and biases included."""

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        if name.endswith("bias"):
            return 0.1 * noise
        return 1 + 0.3 * noise if len(shape) == 1 else GAIN * noise / shape[-1] ** 0.5

    weights = {name: draw(name, shape).astype(np.float32) for name, shape in shapes(config)}
    if config.get("norm_head"):  # else the logits are small
        weights["model.norm.weight"] *= 12
    return weights


def reference(vocab: int, logits: Callable[[list[int]], np.ndarray], prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """Return the arrays of `reference.npz` without the seed; `logits` maps a sequence to the logits of each token."""
    rows = len(prompts)
    made = {
        "prompts": np.full((rows, max(PROMPT_LENGTHS)), -1, np.int32),
        "prompt_logits": np.zeros((rows, max(PROMPT_LENGTHS), vocab), np.float32),
        "tokens": np.zeros((rows, STEPS), np.int32),
        "token_logits": np.zeros((rows, STEPS, vocab), np.float32),
    }
    for row, prompt in enumerate(prompts):
        sequence = list(prompt)
        for step in range(STEPS):
            made["token_logits"][row, step] = logits(sequence)[-1]
            sequence.append(int(made["token_logits"][row, step].argmax()))
        made["prompts"][row, : len(prompt)] = prompt
        made["prompt_logits"][row, : len(prompt)] = logits(prompt)
        made["tokens"][row] = sequence[len(prompt) :]
    return made


def block_reference(
    config: dict[str, Any],
    schedule: tuple[float, int],
    logits: Callable[[list[int]], np.ndarray],
    prompts: list[list[int]],
) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the arrays of `reference.npz` of a block diffusion model, and its fault as a golden, if it has one.

    The logits of a token are those of the denoising step that chose it.
    """
    rows, vocab, (threshold, steps) = len(prompts), config["vocab_size"], schedule
    made = {
        "prompts": np.full((rows, max(PROMPT_LENGTHS)), -1, np.int32),
        "prompt_logits": np.zeros((rows, max(PROMPT_LENGTHS), vocab), np.float32),
        "tokens": np.zeros((rows, STEPS), np.int32),
        "token_logits": np.zeros((rows, STEPS, vocab), np.float32),
        "threshold": np.array(threshold),
        "steps": np.array(steps),
    }
    margins: list[float] = []
    sizes: list[int] = []
    for row, prompt in enumerate(prompts):
        decoded = decode(
            logits, prompt, STEPS, block=config["block_size"], mask=config["mask_token_id"], threshold=threshold,
            steps=steps,
        )  # fmt: skip
        made["prompts"][row, : len(prompt)] = prompt
        made["prompt_logits"][row, : len(prompt)] = logits(prompt)
        made["tokens"][row] = decoded.tokens
        made["token_logits"][row] = np.maximum(decoded.logits, -100)  # the logit of the mask token is minus infinity
        margins += decoded.margins
        sizes += decoded.steps
    if min(margins) <= 1e-3:
        return made, "a decision nearly is another"
    few = config["block_size"] // steps
    if not (max(sizes) > few and sizes.count(few) > len(sizes) // 4):
        return made, "steps choose too many tokens, or too few"
    return made, None


def write(
    name: str, config: dict[str, Any], weights: dict[str, np.ndarray], made: dict[str, np.ndarray], seed: int
) -> None:
    """Write the folder of a case."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / name).mkdir()
    (HERE / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, HERE / name / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(HERE / name / "reference.npz", **made, seed=seed)


def faults(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    prompts: list[list[int]],
    made: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> Iterator[str]:
    """Yield the faults of a model as a golden."""
    second, first = np.sort(made["token_logits"])[..., -2:].transpose(2, 0, 1)
    if ((first - second) / np.abs(made["token_logits"]).max(-1)).min() <= 1e-3:
        yield "two next tokens nearly tie"
    for prompt, with_context in zip(prompts, made["token_logits"][:, 0], strict=True):
        change = np.abs(with_context - logits(config, weights, prompt[-1:])[0]).mean()
        if len(prompt) > 1 and change < 0.5 * made["token_logits"].std():
            yield "dropping the context hardly changes the logits"
    yield from jumps(config, weights, prompts, made, rng)


def jumps(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    prompts: list[list[int]],
    made: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> Iterator[str]:
    """Yield the faults that any model can have: flat or constant logits, logits that jump at a nudge."""
    if made["token_logits"].std() < 1:
        yield "the logits hardly spread"
    if min(len(set(row)) for row in made["tokens"].tolist()) < STEPS // 2:
        yield "a continuation hardly varies"
    name = next(iter(weights))
    for _ in range(4):
        nudged = weights | {name: weights[name] * (1 + NUDGE * rng.standard_normal(weights[name].shape))}
        for prompt, tokens in zip(prompts, made["tokens"].tolist(), strict=True):
            before, after = (logits(config, held, prompt + tokens) for held in (weights, nudged))
            if np.abs(after - before).max() > MAX_CHANGE * np.abs(before).max():
                yield "a nudge makes the logits jump"


def make_case(name: str) -> int:
    """Write the checkpoint and the reference of the first seed without faults, and return that seed."""
    config = CASES[name]
    for seed in count():
        rng = np.random.default_rng(seed)
        weights = drawn(config, rng)
        prompts = [rng.integers(config["vocab_size"], size=length).tolist() for length in PROMPT_LENGTHS]
        of_model = partial(logits, config, weights)
        if name in SCHEDULES:
            made, fault = block_reference(config, SCHEDULES[name], of_model, prompts)
            fault = fault or next(jumps(config, weights, prompts, made, rng), None)
        else:
            made = reference(config["vocab_size"], of_model, prompts)
            fault = next(faults(config, weights, prompts, made, rng), None)
        if fault is None:
            break
        print(f"{name}: not seed {seed}, {fault}")
    write(name, config, weights, made, seed)
    return seed


def main(names: list[str]) -> None:
    for name in names or CASES:
        seed = make_case(name)
        size = sum(file.stat().st_size for file in (HERE / name).iterdir())
        print(f"{name}: seed {seed}, {size // 1024} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
