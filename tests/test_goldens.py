"""Parity with transformers: logits and greedy tokens of tiny checkpoints (see goldens/make_goldens.py). Families that
transformers does not have are compared with plain NumPy (see plain.py)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import plain
import plain_blocks
import pytest
from placements import PLACEMENTS
from safetensors.numpy import load_file
from scipy.special import log_softmax

from moe_jax import LLM, SamplingParams
from moe_jax.kernels.kv_cache import AttentionTile
from moe_jax.models import sharded

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 2e-5
"""Relative to the largest logit, in float32."""


def model_type(case: str) -> str:
    return json.loads((GOLDENS / case / "config.json").read_text())["model_type"]


FIRST = "qwen3_moe_gqa4_e8_top2"
ON = [("dp4_ep4_tp2", "scatter"), ("dp2_ep4", "reduce"), ("tp8_ep4", "reduce"), ("dp8_ep4_moe_tp2", "scatter")]
"""Every family that transformers has is on these: attention with data and tensor parallelism, both, experts split by
number and by width. Those that are compared with plain NumPy are on the first and the third."""
FAMILIES = {
    FIRST: ("qwen3_moe_gqa8_e16_top4_sparse_step", "qwen3_moe_gqa2_e12_top1_dense"),
    "qwen2_moe_gqa2_e8_top4_sparse_step": ("qwen2_moe_gqa1_e4_top2", "qwen2_moe_gqa4_e12_top2_window"),
    "mixtral_gqa8_e16_top4_sharded": (),
    "olmoe_gqa2_e8_top2_clip": ("olmoe_gqa8_e8_top3",),
    "granitemoe_gqa2_e8_top3": ("granitemoe_gqa4_e4_top2_bias",),
    "glm4_moe_gqa2_e8_top2_groups": ("glm4_moe_gqa8_e8_top3_qk_norm",),
    "hy_v3_gqa2_e8_top2": (),
    "hunyuan_v1_moe_gqa2_e8_alpha": ("hunyuan_v1_moe_gqa1_e8_top1_bias",),
    "minimax_m2_gqa2_e8_top2": (),
    "ernie4_5_moe_gqa2_e8_top3": (),
    "exaone_moe_gqa2_e8_top2_groups": (),
    "gpt_oss_gqa2_e8_top2_yarn": ("gpt_oss_gqa8_e4_top3",),
    "dbrx_gqa2_e8_top2_clip": ("dbrx_gqa8_e4_top3_norm2",),
    "phimoe_gqa2_e8_bias": ("phimoe_gqa4_e4_longrope",),
    "deepseek_v2_e8_top3": ("deepseek_v2_e8_top2_groups_yarn",),
    "deepseek_v3_e8_top2_groups_yarn": ("deepseek_v3_e4_top2_halves",),
    "llama4_text_gqa2_e8_top1": (),
    "step3p7_gqa4_e8_top2": (),
    "bailing_moe_gqa4_e8_top3": (),
    "bailing_moe_v2_gqa2_e8_top2_groups": (),
    "sarvam_mla_e24_top2": (),
    "mimo_v2_flash_gqa4_e8_top2": ("mimo_v2_flash_gqa8_e8_top2_groups_bias",),
    "qwen3_next_e8_top2": ("qwen3_next_e4_top3_sparse_step",),
    "qwen3_5_moe_text_e8_top2": ("qwen3_5_moe_text_e4_top3",),
    "bailing_hybrid_e8_top2": ("bailing_hybrid_e4_top2_softplus",),
    "bailing_moe_linear_e8_top2": (),
    "jamba_e8_top2": ("jamba_e4_top3_bias",),
    "llada2_moe_gqa4_e8_top2_groups": (),
    "sdar_moe_gqa2_e8_top3": (),
}
"""A case of each, and others, which take the last placements over."""
ELSEWHERE = {
    "qwen3_moe_gqa1_e6_top2_window": "expert=6",
    "mixtral_gqa1_e4_top2": "data=1",
    "mixtral_gqa2_e6_top1_window": "data=2,expert=2,tensor=2",
    "llama4_gqa4_e4_top2_bias": "data=2,expert=2,tensor=2",
    "step3p5_gqa8_e4_top3": "expert=4,tensor=2",
    "bailing_moe_linear_e4_top1_six_heads": "data=2,expert=2,tensor=2",
    "sarvam_moe_gqa8_e8_top2": "data=2,expert=2,tensor=2",
    "qwen3_5_moe_e4_top3": "data=2,expert=2,tensor=2",
}
"""More cases, and model types that differ from one above by names only; the policy decides."""
PLAIN = [case for case in (*FAMILIES, *ELSEWHERE) if case.startswith(("bailing_moe_gqa", "bailing_moe_v2", "sarvam"))]
BLOCKS = [case for case in FAMILIES if case.startswith(("llada2", "sdar"))]
"""Decoded in blocks."""
WITHOUT_REFERENCE = [*PLAIN, *BLOCKS, "bailing_moe_linear_e8_top2"]
MAIN_CASES = list({model_type(case): case for case in reversed([*FAMILIES, *ELSEWHERE])}.values())
"""One of each model type."""
CASES = [
    (runs, PLACEMENTS[name], combine, "whole")
    for case, others in FAMILIES.items()
    if case not in WITHOUT_REFERENCE
    for (name, combine), runs in zip(ON, (*[case] * (len(ON) - len(others)), *others), strict=True)
]
CASES += [
    (case, PLACEMENTS[name], combine, "whole")
    for case in WITHOUT_REFERENCE
    if case in FAMILIES
    for name, combine in ON[::2]
]
CASES += [(case, mesh, "auto", "auto") for case, mesh in ELSEWHERE.items()]
CASES += [
    (FIRST, PLACEMENTS[name], combine, residual)
    for name, combine, residual in (
        ("dp8_ep8", "scatter", "whole"),
        ("dp4_ep4_tp2", "scatter", "split"),
        ("dp2_ep4", "all-to-all", "whole"),
        ("tp8_ep4", "reduce", "split"),
    )
]
CASES += [
    ("qwen2_moe_gqa2_e8_top4_sparse_step", PLACEMENTS["dp2_ep4"], "ragged", "split"),
    ("mixtral_gqa8_e16_top4_sharded", PLACEMENTS["dp4_ep4_tp2"], "all-to-all", "split"),
]

DECODED_APART = [
    (case, PLACEMENTS[ON[0][0]])
    for case in (
        FIRST,
        "mimo_v2_flash_gqa4_e8_top2",
        "deepseek_v3_e8_top2_groups_yarn",
        "qwen3_next_e8_top2",
        "bailing_moe_linear_e8_top2",
        "jamba_e8_top2",
        "llada2_moe_gqa4_e8_top2_groups",
        "llama4_text_gqa2_e8_top1",
    )
]
"""One for each way to remember: prompts are computed first, and then all decode, as engines mostly do, which is two
programs to compile; and attention takes lines and pages one after the other. Elsewhere long prompts run beside, so that
in every step decode rows lie among those of prompts, and there is one program."""


@pytest.mark.parametrize("case", PLAIN)
def test_plain_numpy_says_the_same_still(case: str) -> None:
    config = json.loads((GOLDENS / case / "config.json").read_text())
    weights, reference = load_file(GOLDENS / case / "model.safetensors"), np.load(GOLDENS / case / "reference.npz")
    for prompt, tokens, expected in zip(
        *(reference[name] for name in ("prompts", "tokens", "token_logits")), strict=True
    ):
        prompt = prompt[prompt >= 0].tolist()
        got = plain.logits(config, weights, prompt + tokens[:-1].tolist())[len(prompt) - 1 :]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", BLOCKS)
def test_plain_blocks_are_the_same_still(case: str) -> None:
    config = json.loads((GOLDENS / case / "config.json").read_text())
    weights, reference = load_file(GOLDENS / case / "model.safetensors"), np.load(GOLDENS / case / "reference.npz")
    schedule = {"threshold": float(reference["threshold"]), "steps": int(reference["steps"])}
    for prompt, told, tokens, expected in zip(
        *(reference[name] for name in ("prompts", "prompt_logits", "tokens", "token_logits")), strict=True
    ):
        prompt = prompt[prompt >= 0].tolist()
        np.testing.assert_allclose(plain.logits(config, weights, prompt), told[: len(prompt)], rtol=0, atol=1e-5)
        decoded = plain_blocks.decode(
            partial(plain.logits, config, weights), prompt, len(tokens), block=config["block_size"],
            mask=config["mask_token_id"], **schedule,
        )  # fmt: skip
        assert decoded.tokens == tokens.tolist()
        np.testing.assert_allclose(np.maximum(decoded.logits, -100), expected, rtol=0, atol=1e-5)


def test_every_golden_is_tested() -> None:
    assert {case for case, *_ in CASES} == {path.parent.name for path in GOLDENS.glob("*/reference.npz")}
    assert {(case, mesh) for case, mesh, *_ in CASES}.issuperset(DECODED_APART)


@pytest.mark.usefixtures("no_cache_writes")
@pytest.mark.parametrize(("case", "mesh", "combine", "residual"), CASES)
def test_parity_with_transformers(
    case: str, mesh: str, combine: str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = (case, mesh) in DECODED_APART
    if apart:
        monkeypatch.setattr(sharded, "attention_tile_on", lambda _: AttentionTile(segments=1, pages=1))
    assert_parity(case, mesh, combine, residual, others=0 if apart else 3)


def assert_parity(case: str, mesh: str, combine: str, residual: str, others: int) -> None:
    """`others` are long prompts that run beside."""
    reference = np.load(GOLDENS / case / "reference.npz")
    prompts = [prompt[prompt >= 0].tolist() for prompt in reference["prompts"]]
    steps = reference["tokens"].shape[1]
    llm = LLM(
        GOLDENS / case, mesh=mesh, combine=combine, residual=residual, dtype="float32", prefill_tokens=2,
        max_batch_size=8,
    )  # fmt: skip
    schedule = (
        {"confidence_threshold": float(reference["threshold"]), "denoising_steps": int(reference["steps"])}
        if case in BLOCKS
        else {}
    )
    beside = [[0] * llm.max_length] * others
    lengths = [steps] * len(prompts) + [1] * len(beside)
    greedy = [SamplingParams(temperature=0, max_tokens=length, **schedule) for length in lengths]
    everyone = llm.request_groups([*prompts, *beside], greedy, wants_logits=True)
    list(llm._run(everyone))
    request_groups = everyone[: len(prompts)]

    for group, padded in zip(request_groups, reference["prompt_logits"], strict=True):
        got = np.concatenate(group.generations[0].prompt_output.logits)
        assert len(got) == len(group.prompt)
        np.testing.assert_allclose(got, padded[: len(got)], rtol=0, atol=TOLERANCE * np.abs(padded).max())

    outputs = [group.output() for group in request_groups]
    assert [output.token_ids for output in outputs] == reference["tokens"].tolist()
    for output, logits in zip(outputs, reference["token_logits"], strict=True):
        expected = log_softmax(logits, axis=-1)[np.arange(steps), output.token_ids]
        np.testing.assert_allclose(output.logprobs, expected, rtol=0, atol=TOLERANCE * np.abs(logits).max())
