"""Parity with transformers: logits and greedy tokens of tiny checkpoints (see goldens/make_goldens.py).

Families that transformers does not have are compared with NumPy references (see plain.py and plain_blocks.py).
"""

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
"""Largest error of a logit in float32, relative to the largest logit."""


def model_type(case: str) -> str:
    return json.loads((GOLDENS / case / "config.json").read_text())["model_type"]


QWEN3 = "qwen3_moe_gqa4_e8_top2"
FAMILY_PLACEMENTS = [
    ("dp4_ep4_tp2", "scatter"),
    ("dp2_ep4", "reduce"),
    ("tp8_ep4", "reduce"),
    ("dp8_ep4_moe_tp2", "scatter"),
]
"""Placements and combines of every family that transformers has. Attention is data parallel, tensor parallel or both,
and experts are split by number and by width. Families with a NumPy reference run on the first and the third."""
FAMILIES = {
    QWEN3: ("qwen3_moe_gqa8_e16_top4_sparse_step", "qwen3_moe_gqa2_e12_top1_dense"),
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
"""First case of each family, and more cases of it, which take the last placements in place of the first case."""
OTHER_CASES = {
    "qwen3_moe_gqa1_e6_top2_window": "expert=6",
    "mixtral_gqa1_e4_top2": "data=1",
    "mixtral_gqa2_e6_top1_window": "data=2,expert=2,tensor=2",
    "llama4_gqa4_e4_top2_bias": "data=2,expert=2,tensor=2",
    "step3p5_gqa8_e4_top3": "expert=4,tensor=2",
    "bailing_moe_linear_e4_top1_six_heads": "data=2,expert=2,tensor=2",
    "sarvam_moe_gqa8_e8_top2": "data=2,expert=2,tensor=2",
    "qwen3_5_moe_e4_top3": "data=2,expert=2,tensor=2",
}
"""Mesh of cases with unusual sizes, and of model types that differ from one above by names only. The policy chooses the
combine."""
NUMPY_CASES = [
    case for case in (*FAMILIES, *OTHER_CASES) if case.startswith(("bailing_moe_gqa", "bailing_moe_v2", "sarvam"))
]
BLOCK_DIFFUSION_CASES = [case for case in FAMILIES if case.startswith(("llada2", "sdar"))]
WITHOUT_TRANSFORMERS = [*NUMPY_CASES, *BLOCK_DIFFUSION_CASES, "bailing_moe_linear_e8_top2"]
MAIN_CASES = list({model_type(case): case for case in reversed([*FAMILIES, *OTHER_CASES])}.values())
"""One case of each model type."""
CASES = [
    (case, PLACEMENTS[name], combine, "whole")
    for first, others in FAMILIES.items()
    if first not in WITHOUT_TRANSFORMERS
    for (name, combine), case in zip(
        FAMILY_PLACEMENTS, (*[first] * (len(FAMILY_PLACEMENTS) - len(others)), *others), strict=True
    )
]
CASES += [
    (case, PLACEMENTS[name], combine, "whole")
    for case in WITHOUT_TRANSFORMERS
    if case in FAMILIES
    for name, combine in FAMILY_PLACEMENTS[::2]
]
CASES += [(case, mesh, "auto", "auto") for case, mesh in OTHER_CASES.items()]
CASES += [
    (QWEN3, PLACEMENTS[name], combine, residual)
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

PREFILL_THEN_DECODE = [
    (case, PLACEMENTS["dp4_ep4_tp2"])
    for case in (
        QWEN3,
        "mimo_v2_flash_gqa4_e8_top2",
        "deepseek_v3_e8_top2_groups_yarn",
        "qwen3_next_e8_top2",
        "bailing_moe_linear_e8_top2",
        "jamba_e8_top2",
        "llada2_moe_gqa4_e8_top2_groups",
        "llama4_text_gqa2_e8_top1",
    )
]
"""Cases with one family for each kind of cache or recurrent state, which compute all prompts before they decode.

These take two programs, and attention takes one segment and one page at a time. In the other cases long prompts keep
running, so that every step mixes decode rows with prompt rows, in a single program.
"""


@pytest.mark.parametrize("case", NUMPY_CASES)
def test_numpy_reference_reproduces_its_goldens(case: str) -> None:
    config = json.loads((GOLDENS / case / "config.json").read_text())
    weights, reference = load_file(GOLDENS / case / "model.safetensors"), np.load(GOLDENS / case / "reference.npz")
    for prompt, tokens, expected in zip(
        *(reference[name] for name in ("prompts", "tokens", "token_logits")), strict=True
    ):
        prompt = prompt[prompt >= 0].tolist()
        got = plain.logits(config, weights, prompt + tokens[:-1].tolist())[len(prompt) - 1 :]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", BLOCK_DIFFUSION_CASES)
def test_block_diffusion_reference_reproduces_its_goldens(case: str) -> None:
    config = json.loads((GOLDENS / case / "config.json").read_text())
    weights, reference = load_file(GOLDENS / case / "model.safetensors"), np.load(GOLDENS / case / "reference.npz")
    schedule = {"threshold": float(reference["threshold"]), "steps": int(reference["steps"])}
    for prompt, prompt_logits, tokens, expected in zip(
        *(reference[name] for name in ("prompts", "prompt_logits", "tokens", "token_logits")), strict=True
    ):
        prompt = prompt[prompt >= 0].tolist()
        np.testing.assert_allclose(
            plain.logits(config, weights, prompt), prompt_logits[: len(prompt)], rtol=0, atol=1e-5
        )
        decoded = plain_blocks.decode(
            partial(plain.logits, config, weights), prompt, len(tokens), block=config["block_size"],
            mask=config["mask_token_id"], **schedule,
        )  # fmt: skip
        assert decoded.tokens == tokens.tolist()
        np.testing.assert_allclose(np.maximum(decoded.logits, -100), expected, rtol=0, atol=1e-5)


def test_every_golden_is_tested() -> None:
    assert {case for case, *_ in CASES} == {path.parent.name for path in GOLDENS.glob("*/reference.npz")}
    assert {(case, mesh) for case, mesh, *_ in CASES}.issuperset(PREFILL_THEN_DECODE)


@pytest.mark.usefixtures("no_cache_writes")
@pytest.mark.parametrize(("case", "mesh", "combine", "residual"), CASES)
def test_parity_with_transformers(
    case: str, mesh: str, combine: str, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill_first = (case, mesh) in PREFILL_THEN_DECODE
    if prefill_first:
        monkeypatch.setattr(sharded, "attention_tile_on", lambda _: AttentionTile(segments=1, pages=1))
    assert_parity(case, mesh, combine, residual, others=0 if prefill_first else 3)


def assert_parity(case: str, mesh: str, combine: str, residual: str, others: int) -> None:
    """Compare the logits and greedy tokens of one case, with `others` long prompts in the same steps."""
    reference = np.load(GOLDENS / case / "reference.npz")
    prompts = [prompt[prompt >= 0].tolist() for prompt in reference["prompts"]]
    steps = reference["tokens"].shape[1]
    llm = LLM(
        GOLDENS / case, mesh=mesh, combine=combine, residual=residual, dtype="float32", prefill_tokens=2,
        max_batch_size=8,
    )  # fmt: skip
    schedule = (
        {"confidence_threshold": float(reference["threshold"]), "denoising_steps": int(reference["steps"])}
        if case in BLOCK_DIFFUSION_CASES
        else {}
    )
    max_tokens = [steps] * len(prompts) + [1] * others
    greedy = [SamplingParams(temperature=0, max_tokens=limit, **schedule) for limit in max_tokens]
    all_groups = llm.request_groups([*prompts, *[[0] * llm.max_length] * others], greedy, logits_rows=llm.max_length)
    list(llm.engine_loop.finished(all_groups))
    request_groups = all_groups[: len(prompts)]

    for group, padded in zip(request_groups, reference["prompt_logits"], strict=True):
        got = np.concatenate(group.generations[0].prompt_output.logits)
        assert len(got) == len(group.prompt)
        np.testing.assert_allclose(got, padded[: len(got)], rtol=0, atol=TOLERANCE * np.abs(padded).max())

    outputs = [group.output() for group in request_groups]
    assert [output.token_ids for output in outputs] == reference["tokens"].tolist()
    for output, logits in zip(outputs, reference["token_logits"], strict=True):
        expected = log_softmax(logits, axis=-1)[np.arange(steps), output.token_ids]
        np.testing.assert_allclose(output.logprobs, expected, rtol=0, atol=TOLERANCE * np.abs(logits).max())
